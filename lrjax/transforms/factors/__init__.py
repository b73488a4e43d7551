"""Transforms that map over LowRank nodes and need both factors."""

from .add_anchor import AddAnchorState as AddAnchorState, add_anchor as add_anchor
from .add_frobenius_decay import add_frobenius_decay as add_frobenius_decay
from .add_imbalance_penalty import add_imbalance_penalty as add_imbalance_penalty
from .add_nuclear_norm import add_nuclear_norm as add_nuclear_norm
from .keep_orthonormal import keep_orthonormal as keep_orthonormal
from .landing_field import landing_field as landing_field
from .perturb_along_momentum import (
    PerturbAlongMomentumState as PerturbAlongMomentumState,
    perturb_along_momentum as perturb_along_momentum,
    perturbed_params as perturbed_params,
)
from .rebalance import RebalanceState as RebalanceState, rebalance as rebalance
from .retract import retract as retract
from .scale_by_gauss_newton import scale_by_gauss_newton as scale_by_gauss_newton
from .scale_by_gram import (
    ScaleByGramState as ScaleByGramState,
    scale_by_gram as scale_by_gram,
    unit_norm as unit_norm,
)
from .scale_by_matrix_adam import (
    ScaleByMatrixAdamState as ScaleByMatrixAdamState,
    scale_by_matrix_adam as scale_by_matrix_adam,
)
from .scale_by_polyak import scale_by_polyak as scale_by_polyak
from .scale_by_row_norms import scale_by_row_norms as scale_by_row_norms
from .scale_by_tangent import scale_by_tangent as scale_by_tangent
from .scale_by_target_level import (
    ScaleByTargetLevelState as ScaleByTargetLevelState,
    scale_by_target_level as scale_by_target_level,
)
from .scale_factors import scale_factors as scale_factors
