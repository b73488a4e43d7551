"""Kinds around other kinds: a magnitude, a bias, a share, a sum, a part of the outputs."""

from .biased import Biased as Biased, WithBias as WithBias
from .fused import Fused as Fused, FusedRows as FusedRows
from .magnitude import (
    BoRA as BoRA,
    DoRA as DoRA,
    Magnitude as Magnitude,
    WithMagnitude as WithMagnitude,
)
from .weighted import Summed as Summed, Weighted as Weighted
