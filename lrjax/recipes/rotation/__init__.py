"""Optimizers whose preconditioner is fitted: rotated bases, low-rank curvature."""

from .psgd import psgd as psgd
from .soap import soap as soap
