"""Arrays in, arrays out: the decompositions that every other room is built on."""

from ._numerics import (
    carrying_precision as carrying_precision,
    check_rank as check_rank,
    cross as cross,
    identity_like as identity_like,
    increment as increment,
    nonzero as nonzero,
    outer as outer,
    product_rounding as product_rounding,
    products_at as products_at,
    rounding as rounding,
    times as times,
    together as together,
    unit_columns as unit_columns,
    working_dtype as working_dtype,
)
from .decompositions import (
    TruncatedSVD as TruncatedSVD,
    check_polar_method as check_polar_method,
    eigh as eigh,
    pivoted_columns as pivoted_columns,
    polar as polar,
    procrustes as procrustes,
    product_svd as product_svd,
    singular_values as singular_values,
    subspace_iteration as subspace_iteration,
    svd as svd,
    truncated_svd as truncated_svd,
    weighted_svd as weighted_svd,
)
from .extend_basis import extend_basis as extend_basis
from .gram import (
    cholesky as cholesky,
    gram as gram,
    inverse_gram as inverse_gram,
    inverse_grams as inverse_grams,
    inverse_root_gram as inverse_root_gram,
    inverse_root_grams as inverse_root_grams,
    orthonormalizers as orthonormalizers,
)
from .low_rank_plus_diagonal import (
    InverseLowRankPlusDiagonal as InverseLowRankPlusDiagonal,
    LowRankPlusDiagonal as LowRankPlusDiagonal,
    Woodbury as Woodbury,
)
from .orthonormalize import orthonormalize as orthonormalize
from .sketches import (
    Fastfood as Fastfood,
    RowSample as RowSample,
    Sensitivities as Sensitivities,
    fastfood as fastfood,
    leverage_scores as leverage_scores,
    lewis_weights as lewis_weights,
    lp_sensitivities as lp_sensitivities,
    nystrom as nystrom,
    nystrom_preconditioner as nystrom_preconditioner,
    nystrom_sketch as nystrom_sketch,
    sample_rows as sample_rows,
    walsh_hadamard as walsh_hadamard,
)
from .spectra import (
    energy_mask as energy_mask,
    firm_threshold as firm_threshold,
    hard_threshold as hard_threshold,
    keep_largest as keep_largest,
    lq_threshold as lq_threshold,
    map_singular_values as map_singular_values,
    optimal_shrinkage as optimal_shrinkage,
    order_statistic as order_statistic,
    penalized_rank as penalized_rank,
    soft_threshold as soft_threshold,
)
from .sqrtm import inverse_sqrtm as inverse_sqrtm, sqrtm as sqrtm
from .subspaces import (
    SubspaceAverage as SubspaceAverage,
    SubspaceDifference as SubspaceDifference,
    SubspaceError as SubspaceError,
    geodesic as geodesic,
    pca_split_rotation as pca_split_rotation,
    principal_angles as principal_angles,
    subspace_acceleration as subspace_acceleration,
    subspace_difference as subspace_difference,
    subspace_error as subspace_error,
    subspace_mean as subspace_mean,
    subspace_median as subspace_median,
    subspace_overlap as subspace_overlap,
)
from .tall import (
    tall_apply as tall_apply,
    tall_gram as tall_gram,
    tall_inner as tall_inner,
    tall_mix as tall_mix,
    tall_svd as tall_svd,
)
