"""Optax gradient transformations that know about factors; one public name a file."""

from .dense import scale_by_smooth_polar as scale_by_smooth_polar
from .factors import (
    Pair as Pair,
    ScaleByGramState as ScaleByGramState,
    ScaleByLevelState as ScaleByLevelState,
    add_nuclear_norm as add_nuclear_norm,
    on_pairs as on_pairs,
    pairs_by_name as pairs_by_name,
    rebalance as rebalance,
    scale_by_gauss_newton as scale_by_gauss_newton,
    scale_by_gram as scale_by_gram,
    scale_by_level as scale_by_level,
    scale_by_polyak as scale_by_polyak,
    scale_by_tangent as scale_by_tangent,
    scale_factors as scale_factors,
    unit_norm as unit_norm,
)
from .subspace import (
    CompressMomentumState as CompressMomentumState,
    ProjectUpdatesState as ProjectUpdatesState,
    compress_momentum as compress_momentum,
    data_parallel_specs as data_parallel_specs,
    project_updates as project_updates,
    rotate_updates as rotate_updates,
)
