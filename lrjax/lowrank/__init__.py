"""The nodes that hold a matrix in factors, and what can be computed without forming it."""

from .algebra import (
    add as add,
    balance as balance,
    inner as inner,
    norm as norm,
    refactor as refactor,
    svd as svd,
    truncate as truncate,
)
from .nodes import LowRank as LowRank, SVDForm as SVDForm, is_low_rank as is_low_rank
