"""Transforms of whole matrices and of plain leaves: no factors, no subspace loop."""

from .curvature import (
    KroneckerFactor as KroneckerFactor,
    RotateUpdatesState as RotateUpdatesState,
    ScaleByGradientWindowState as ScaleByGradientWindowState,
    ScaleByKLShampooState as ScaleByKLShampooState,
    ScaleByNystromState as ScaleByNystromState,
    ScaleByPSGDKronState as ScaleByPSGDKronState,
    ScaleByPSGDState as ScaleByPSGDState,
    hessian_product as hessian_product,
    rotate_updates as rotate_updates,
    scale_by_gradient_window as scale_by_gradient_window,
    scale_by_kl_shampoo as scale_by_kl_shampoo,
    scale_by_nystrom as scale_by_nystrom,
    scale_by_psgd as scale_by_psgd,
    scale_by_psgd_kron as scale_by_psgd_kron,
)
from .follow_geodesics import follow_geodesics as follow_geodesics
from .momentum import (
    AmplifySlowState as AmplifySlowState,
    AmplifySlowWindowState as AmplifySlowWindowState,
    CompressMomentumState as CompressMomentumState,
    FactoredMomentumState as FactoredMomentumState,
    amplify_slow as amplify_slow,
    compress_momentum as compress_momentum,
    data_parallel_specs as data_parallel_specs,
    factored_momentum as factored_momentum,
)
from .norms import (
    FrankWolfeState as FrankWolfeState,
    LimitNormGrowthState as LimitNormGrowthState,
    NormalizeRowsState as NormalizeRowsState,
    ScaleByLayerTrustState as ScaleByLayerTrustState,
    ScaleBySubsetNormState as ScaleBySubsetNormState,
    frank_wolfe as frank_wolfe,
    limit_norm_growth as limit_norm_growth,
    normalize_rows as normalize_rows,
    orthogonalize_updates as orthogonalize_updates,
    scale_by_layer_trust as scale_by_layer_trust,
    scale_by_lion_k as scale_by_lion_k,
    scale_by_smooth_polar as scale_by_smooth_polar,
    scale_by_subset_norm as scale_by_subset_norm,
)
from .project_conflicts import (
    ProjectConflictsState as ProjectConflictsState,
    project_conflicts as project_conflicts,
)
from .project_out import ProjectOutState as ProjectOutState, project_out as project_out
from .scale_by_width import scale_by_width as scale_by_width
