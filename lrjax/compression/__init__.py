"""A trained model in fewer numbers: weights in factors that fit what they are used for."""

from .compress import compress as compress
from .corrections import corrections as corrections
from .decompose import Decomposition as Decomposition, decompose as decompose
from .even_ranks import (
    common_energy_ranks as common_energy_ranks,
    uniform_ranks as uniform_ranks,
)
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
from .statistics import layer_statistics as layer_statistics
from .stored_changes import (
    StoredChange as StoredChange,
    restore_change as restore_change,
    store_change as store_change,
)
from .weighted_factors import (
    WeightedFactors as WeightedFactors,
    weighted_factors as weighted_factors,
)
