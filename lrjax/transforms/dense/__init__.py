"""Transforms of plain matrices and leaves, and wrappers of whole transforms."""

from .amplify_slow import (
    AmplifySlowState as AmplifySlowState,
    AmplifySlowWindowState as AmplifySlowWindowState,
    amplify_slow as amplify_slow,
)
from .every import EveryState as EveryState, every as every
from .limit_norm_growth import (
    LimitNormGrowthState as LimitNormGrowthState,
    limit_norm_growth as limit_norm_growth,
)
from .orthogonalize_updates import orthogonalize_updates as orthogonalize_updates
from .quantize_state import (
    QuantizeStateState as QuantizeStateState,
    quantize_state as quantize_state,
)
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
