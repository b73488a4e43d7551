"""Ranks of adapters that change in training: masks, gates and who decides on them."""

from .growth import change_sensitivity as change_sensitivity, grow_ranks as grow_ranks
from .inputs import prune_inputs as prune_inputs
from .masks import (
    active_ranks as active_ranks,
    drop_ranks as drop_ranks,
    gates as gates,
    with_ranks as with_ranks,
)
from .orthogonality import orthogonality as orthogonality
from .prune_ranks import PruneRanksState as PruneRanksState, prune_ranks as prune_ranks
from .rounds import ablation_scores as ablation_scores, move_ranks as move_ranks
