"""Transforms that choose which numbers are in use: shrink, prune and freeze."""

from .add_condition_penalty import add_condition_penalty as add_condition_penalty
from .add_hierarchical_lasso import add_hierarchical_lasso as add_hierarchical_lasso
from .dynamical_low_rank import (
    DynamicalLowRankState as DynamicalLowRankState,
    dynamical_low_rank as dynamical_low_rank,
)
from .freeze_factors import (
    FreezeFactorsState as FreezeFactorsState,
    freeze_factors as freeze_factors,
)
from .keep_rank import keep_rank as keep_rank
from .prune_columns import (
    PruneColumnsState as PruneColumnsState,
    prune_columns as prune_columns,
)
from .prune_entries import (
    PruneEntriesState as PruneEntriesState,
    prune_entries as prune_entries,
)
from .pull_to_low_rank import (
    PullToLowRankState as PullToLowRankState,
    pull_to_low_rank as pull_to_low_rank,
)
from .riemannian import riemannian as riemannian
from .sample_directions import (
    SampleDirectionsState as SampleDirectionsState,
    sample_directions as sample_directions,
)
from .sample_prefix import sample_prefix as sample_prefix
from .sensitivity import Sensitivity as Sensitivity, cubic_schedule as cubic_schedule
from .shrink import shrink as shrink
from .shrink_singular_values import shrink_singular_values as shrink_singular_values
