"""Low-rank learning for JAX."""

from importlib.metadata import version as _version

from . import linalg as linalg
from .lowrank import (
    LowRank as LowRank,
    SVDForm as SVDForm,
    add as add,
    balance as balance,
    inner as inner,
    is_low_rank as is_low_rank,
    norm as norm,
    svd as svd,
    truncate as truncate,
)


__version__ = _version("lrjax")
