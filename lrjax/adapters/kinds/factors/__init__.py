"""Kinds whose change is a product of two trained factors, whole or in parts."""

from .gated import (
    RESERVE as RESERVE,
    AdaLoRA as AdaLoRA,
    IncreLoRA as IncreLoRA,
    SoRA as SoRA,
)
from .masked import NLS as NLS, CapaBoost as CapaBoost, DyLoRA as DyLoRA
from .pair import Factors as Factors, LoRA as LoRA
from .tokens import TokenRows as TokenRows
