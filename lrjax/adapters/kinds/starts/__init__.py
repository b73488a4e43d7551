"""Where the factors of an adapter start: what ``LoRA(init=…)`` may be."""

from .from_data import (
    GradientStart as GradientStart,
    SpectralStart as SpectralStart,
    StepStart as StepStart,
    VarianceStart as VarianceStart,
    WeightedStart as WeightedStart,
)
from .names import checked_start as checked_start
from .start import (
    OrthogonalStart as OrthogonalStart,
    QRStart as QRStart,
    ScaledStart as ScaledStart,
    SingularStart as SingularStart,
    SmallStart as SmallStart,
    Start as Start,
    Train as Train,
    ZeroStart as ZeroStart,
)
