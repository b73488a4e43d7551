"""Transforms that choose which numbers are in use: shrink, prune and freeze."""

from .manifolds import (
    DynamicalLowRankState as DynamicalLowRankState,
    add_condition_penalty as add_condition_penalty,
    dynamical_low_rank as dynamical_low_rank,
    riemannian as riemannian,
)
from .pruning import (
    FreezeFactorsState as FreezeFactorsState,
    PruneColumnsState as PruneColumnsState,
    PruneEntriesState as PruneEntriesState,
    Sensitivity as Sensitivity,
    cubic_schedule as cubic_schedule,
    freeze_factors as freeze_factors,
    prune_columns as prune_columns,
    prune_entries as prune_entries,
)
from .sample_directions import (
    SampleDirectionsState as SampleDirectionsState,
    sample_directions as sample_directions,
)
from .sample_prefix import sample_prefix as sample_prefix
from .shrinkage import (
    PullToLowRankState as PullToLowRankState,
    add_hierarchical_lasso as add_hierarchical_lasso,
    keep_rank as keep_rank,
    pull_to_low_rank as pull_to_low_rank,
    shrink as shrink,
    shrink_singular_values as shrink_singular_values,
)
