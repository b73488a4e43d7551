"""Optax gradient transformations that know about factors; one public name a file."""

from .add_nuclear_norm import add_nuclear_norm as add_nuclear_norm
from .compress_momentum import (
    CompressMomentumState as CompressMomentumState,
    compress_momentum as compress_momentum,
)
from .on_pairs import Pair as Pair, on_pairs as on_pairs, pairs_by_name as pairs_by_name
from .project_updates import (
    ProjectUpdatesState as ProjectUpdatesState,
    project_updates as project_updates,
)
from .rebalance import rebalance as rebalance
from .scale_by_gram import (
    ScaleByGramState as ScaleByGramState,
    scale_by_gram as scale_by_gram,
    unit_norm as unit_norm,
)
from .scale_by_polyak import scale_by_polyak as scale_by_polyak
from .scale_by_smooth_polar import scale_by_smooth_polar as scale_by_smooth_polar
from .scale_by_tangent import scale_by_tangent as scale_by_tangent
from .scale_factors import scale_factors as scale_factors
