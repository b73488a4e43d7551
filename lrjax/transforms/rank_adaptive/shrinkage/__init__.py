"""Spectra and columns shrunk, until some of them are zero."""

from .add_hierarchical_lasso import add_hierarchical_lasso as add_hierarchical_lasso
from .keep_rank import keep_rank as keep_rank
from .pull_to_low_rank import (
    PullToLowRankState as PullToLowRankState,
    pull_to_low_rank as pull_to_low_rank,
)
from .shrink import shrink as shrink
from .shrink_singular_values import shrink_singular_values as shrink_singular_values
