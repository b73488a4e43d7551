"""Kinds whose trained part is a small core between two factors."""

from .adapter import Combination as Combination, Core as Core
from .aligned import LoRASB as LoRASB
from .orthonormal import PoLAR as PoLAR, StelLA as StelLA
from .pivoted import PMSS as PMSS, LoLDU as LoLDU
from .reused import EigenLoRAx as EigenLoRAx
from .singular import (
    LoRAXS as LoRAXS,
    NoRA as NoRA,
    SVFit as SVFit,
    TinyLoRA as TinyLoRA,
)
from .tied import LoTR as LoTR
