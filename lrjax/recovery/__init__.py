"""Recover low-rank matrices from corrupted, partial or indirect measurements."""

from ._inputs import MatrixEntries as MatrixEntries, matrix_entries as matrix_entries
from .completion import (
    CompletionFit as CompletionFit,
    Prior as Prior,
    Representers as Representers,
    alternating_least_squares as alternating_least_squares,
    fit_completion as fit_completion,
    representer_points as representer_points,
    row_contributions as row_contributions,
)
from .isometry import (
    MixedNormRIP as MixedNormRIP,
    SignRIP as SignRIP,
    mixed_norm_rip as mixed_norm_rip,
    sign_rip as sign_rip,
)
from .losses import (
    L1 as L1,
    Huber as Huber,
    Objective as Objective,
    Quantile as Quantile,
    Squared as Squared,
)
from .observe import (
    Spectrum as Spectrum,
    Staircase as Staircase,
    plot_success as plot_success,
    spectrum as spectrum,
    staircase as staircase,
    success_rate as success_rate,
)
from .operators import (
    DenseSensing as DenseSensing,
    Entries as Entries,
    Identity as Identity,
    Masked as Masked,
    Operator as Operator,
    RankOneSensing as RankOneSensing,
)
from .problem import Problem as Problem
from .problems import (
    matrix_completion as matrix_completion,
    matrix_sensing as matrix_sensing,
    phase_retrieval as phase_retrieval,
    robust_pca as robust_pca,
)
from .projected_power import (
    NearestInRange as NearestInRange,
    PowerSolution as PowerSolution,
    projected_power as projected_power,
)
from .semidefinite import (
    SemidefiniteSolution as SemidefiniteSolution,
    solve_semidefinite as solve_semidefinite,
)
from .separation import (
    DescentLayers as DescentLayers,
    ProjectionState as ProjectionState,
    PursuitState as PursuitState,
    RobustPCAFit as RobustPCAFit,
    Separation as Separation,
    SubspaceTracker as SubspaceTracker,
    TrackedRows as TrackedRows,
    alternating_projections as alternating_projections,
    fit_robust_pca as fit_robust_pca,
    geometric_layers as geometric_layers,
    learned_robust_pca as learned_robust_pca,
    principal_component_pursuit as principal_component_pursuit,
    scaled_descent as scaled_descent,
)
from .solve import (
    History as History,
    Solution as Solution,
    SolveState as SolveState,
    solve as solve,
)
from .spectral_init import spectral_init as spectral_init
from .spiked import SpikedModel as SpikedModel, spiked_model as spiked_model
from .tensors import (
    TensorFit as TensorFit,
    fit_robust_tensor as fit_robust_tensor,
    fit_tensor_completion as fit_tensor_completion,
)
