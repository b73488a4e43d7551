"""Transforms that map over LowRank nodes and need both factors."""

from .add_nuclear_norm import add_nuclear_norm as add_nuclear_norm
from .on_pairs import Pair as Pair, on_pairs as on_pairs, pairs_by_name as pairs_by_name
from .rebalance import RebalanceState as RebalanceState, rebalance as rebalance
from .retract import retract as retract
from .scale_by_gauss_newton import scale_by_gauss_newton as scale_by_gauss_newton
from .scale_by_gram import (
    ScaleByGramState as ScaleByGramState,
    scale_by_gram as scale_by_gram,
    unit_norm as unit_norm,
)
from .scale_by_level import (
    ScaleByLevelState as ScaleByLevelState,
    scale_by_level as scale_by_level,
)
from .scale_by_polyak import scale_by_polyak as scale_by_polyak
from .scale_by_tangent import scale_by_tangent as scale_by_tangent
from .scale_factors import scale_factors as scale_factors
