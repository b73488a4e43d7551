"""Optimizers that also follow what their subspace leaves out."""

from .apollo import apollo as apollo
from .fira import fira as fira
from .frugal import frugal as frugal
from .subspace_adam import subspace_adam as subspace_adam
from .subtrack import subtrack as subtrack
