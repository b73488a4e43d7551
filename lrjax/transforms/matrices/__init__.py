"""Transforms of whole matrices and of plain leaves: no factors, no subspace loop."""

from .amplify_slow import (
    AmplifySlowState as AmplifySlowState,
    AmplifySlowWindowState as AmplifySlowWindowState,
    amplify_slow as amplify_slow,
)
from .compress_momentum import (
    CompressMomentumState as CompressMomentumState,
    compress_momentum as compress_momentum,
    data_parallel_specs as data_parallel_specs,
)
from .factored_momentum import (
    FactoredMomentumState as FactoredMomentumState,
    factored_momentum as factored_momentum,
)
from .follow_geodesics import follow_geodesics as follow_geodesics
from .frank_wolfe import FrankWolfeState as FrankWolfeState, frank_wolfe as frank_wolfe
from .limit_norm_growth import (
    LimitNormGrowthState as LimitNormGrowthState,
    limit_norm_growth as limit_norm_growth,
)
from .normalize_rows import (
    NormalizeRowsState as NormalizeRowsState,
    normalize_rows as normalize_rows,
)
from .orthogonalize_updates import orthogonalize_updates as orthogonalize_updates
from .project_conflicts import (
    ProjectConflictsState as ProjectConflictsState,
    project_conflicts as project_conflicts,
)
from .project_out import ProjectOutState as ProjectOutState, project_out as project_out
from .rotate_updates import (
    RotateUpdatesState as RotateUpdatesState,
    rotate_updates as rotate_updates,
)
from .scale_by_gradient_window import (
    ScaleByGradientWindowState as ScaleByGradientWindowState,
    scale_by_gradient_window as scale_by_gradient_window,
)
from .scale_by_kl_shampoo import (
    KroneckerFactor as KroneckerFactor,
    ScaleByKLShampooState as ScaleByKLShampooState,
    scale_by_kl_shampoo as scale_by_kl_shampoo,
)
from .scale_by_layer_trust import (
    ScaleByLayerTrustState as ScaleByLayerTrustState,
    scale_by_layer_trust as scale_by_layer_trust,
)
from .scale_by_lion_k import scale_by_lion_k as scale_by_lion_k
from .scale_by_nystrom import (
    ScaleByNystromState as ScaleByNystromState,
    hessian_product as hessian_product,
    scale_by_nystrom as scale_by_nystrom,
)
from .scale_by_psgd import (
    ScaleByPSGDState as ScaleByPSGDState,
    scale_by_psgd as scale_by_psgd,
)
from .scale_by_psgd_kron import (
    ScaleByPSGDKronState as ScaleByPSGDKronState,
    scale_by_psgd_kron as scale_by_psgd_kron,
)
from .scale_by_smooth_polar import scale_by_smooth_polar as scale_by_smooth_polar
from .scale_by_subset_norm import (
    ScaleBySubsetNormState as ScaleBySubsetNormState,
    scale_by_subset_norm as scale_by_subset_norm,
)
from .scale_by_width import scale_by_width as scale_by_width
