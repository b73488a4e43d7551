"""Transforms that map over LowRank nodes and need both factors."""

from .constraints import (
    RebalanceState as RebalanceState,
    keep_orthonormal as keep_orthonormal,
    landing_field as landing_field,
    rebalance as rebalance,
    retract as retract,
)
from .penalties import (
    AddAnchorState as AddAnchorState,
    add_anchor as add_anchor,
    add_frobenius_decay as add_frobenius_decay,
    add_imbalance_penalty as add_imbalance_penalty,
    add_nuclear_norm as add_nuclear_norm,
)
from .perturb_along_momentum import (
    PerturbAlongMomentumState as PerturbAlongMomentumState,
    perturb_along_momentum as perturb_along_momentum,
    perturbed_params as perturbed_params,
)
from .preconditioners import (
    ScaleByGramState as ScaleByGramState,
    ScaleByMatrixAdamState as ScaleByMatrixAdamState,
    scale_by_gauss_newton as scale_by_gauss_newton,
    scale_by_gram as scale_by_gram,
    scale_by_matrix_adam as scale_by_matrix_adam,
    scale_by_row_norms as scale_by_row_norms,
    scale_by_tangent as scale_by_tangent,
    unit_norm as unit_norm,
)
from .scale_by_polyak import scale_by_polyak as scale_by_polyak
from .scale_by_target_level import (
    ScaleByTargetLevelState as ScaleByTargetLevelState,
    scale_by_target_level as scale_by_target_level,
)
from .scale_factors import scale_factors as scale_factors
