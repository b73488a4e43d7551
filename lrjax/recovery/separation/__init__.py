"""Split a matrix into a low-rank and a sparse part."""

from .alternating_projections import (
    ProjectionState as ProjectionState,
    alternating_projections as alternating_projections,
)
from .alternation import Separation as Separation
from .fit_robust_pca import (
    RobustPCAFit as RobustPCAFit,
    fit_robust_pca as fit_robust_pca,
)
from .learned_robust_pca import (
    DescentLayers as DescentLayers,
    geometric_layers as geometric_layers,
    learned_robust_pca as learned_robust_pca,
)
from .principal_component_pursuit import (
    PursuitState as PursuitState,
    principal_component_pursuit as principal_component_pursuit,
)
from .scaled_descent import scaled_descent as scaled_descent
from .track import SubspaceTracker as SubspaceTracker, TrackedRows as TrackedRows
