"""Complete a low-rank matrix from some of its entries."""

from .alternating_least_squares import (
    alternating_least_squares as alternating_least_squares,
)
from .completed import CompletionFit as CompletionFit, Prior as Prior
from .fit_completion import fit_completion as fit_completion
from .representers import (
    Representers as Representers,
    representer_points as representer_points,
    row_contributions as row_contributions,
)
