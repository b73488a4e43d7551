"""Optimizers of LowRank nodes: the gradient preconditioned by the Gram of the partner."""

from .opsa import opsa as opsa
from .scaled_gd import scaled_gd as scaled_gd
from .scaled_subgradient import scaled_subgradient as scaled_subgradient
