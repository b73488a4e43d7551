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
from .descent import (
    History as History,
    Solution as Solution,
    SolveState as SolveState,
    Spectrum as Spectrum,
    Staircase as Staircase,
    plot_success as plot_success,
    solve as solve,
    spectral_init as spectral_init,
    spectrum as spectrum,
    staircase as staircase,
    success_rate as success_rate,
)
from .problems import (
    L1 as L1,
    DenseSensing as DenseSensing,
    Entries as Entries,
    Huber as Huber,
    Identity as Identity,
    Masked as Masked,
    MixedNormRIP as MixedNormRIP,
    Objective as Objective,
    Operator as Operator,
    Problem as Problem,
    Quantile as Quantile,
    RankOneSensing as RankOneSensing,
    SignRIP as SignRIP,
    SpikedModel as SpikedModel,
    Squared as Squared,
    matrix_completion as matrix_completion,
    matrix_sensing as matrix_sensing,
    mixed_norm_rip as mixed_norm_rip,
    phase_retrieval as phase_retrieval,
    robust_pca as robust_pca,
    sign_rip as sign_rip,
    spiked_model as spiked_model,
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
from .tensors import (
    TensorFit as TensorFit,
    fit_robust_tensor as fit_robust_tensor,
    fit_tensor_completion as fit_tensor_completion,
)
