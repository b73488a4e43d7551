"""A trained model in fewer numbers: weights in factors that fit what they are used for."""

from .foldings import (
    Folding as Folding,
    folded_factors as folded_factors,
    minimax_foldings as minimax_foldings,
)
from .replaced_blocks import (
    block_influence as block_influence,
    replacement_errors as replacement_errors,
    residual_low_rank as residual_low_rank,
)
from .stored_changes import (
    StoredChange as StoredChange,
    restore_change as restore_change,
    store_change as store_change,
)
