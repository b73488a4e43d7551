"""Samples of several subspaces, each found and told from the others."""

from .coding_rate import (
    coding_rate as coding_rate,
    coding_rate_reduction as coding_rate_reduction,
)
from .k_subspaces import KSubspaces as KSubspaces, k_subspaces as k_subspaces
from .low_rank_mixture import (
    LowRankMixture as LowRankMixture,
    MixtureFit as MixtureFit,
    fit_low_rank_mixture as fit_low_rank_mixture,
)
from .scores import clustering_error as clustering_error
from .self_expression import (
    SelfExpression as SelfExpression,
    affinity as affinity,
    low_rank_self_expression as low_rank_self_expression,
    ridge_self_expression as ridge_self_expression,
    sparse_self_expression as sparse_self_expression,
)
