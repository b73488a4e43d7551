"""Steps of a size or of a direction that a norm of the matrix gives."""

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
from .scale_by_layer_trust import (
    ScaleByLayerTrustState as ScaleByLayerTrustState,
    scale_by_layer_trust as scale_by_layer_trust,
)
from .scale_by_lion_k import scale_by_lion_k as scale_by_lion_k
from .scale_by_smooth_polar import scale_by_smooth_polar as scale_by_smooth_polar
from .scale_by_subset_norm import (
    ScaleBySubsetNormState as ScaleBySubsetNormState,
    scale_by_subset_norm as scale_by_subset_norm,
)
