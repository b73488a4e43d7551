"""Optimizers that also follow what their subspace leaves out; adam_sn has no subspace."""

from .adam_sn import adam_sn as adam_sn
from .apollo import apollo as apollo
from .fira import fira as fira
from .frugal import frugal as frugal
from .snsm import snsm as snsm
from .subspace_adam import subspace_adam as subspace_adam
from .subtrack import subtrack as subtrack
