"""Which subspace an optimizer works in, when it moves, and what becomes of the rest."""

from .._codes import (
    BlockQuantized as BlockQuantized,
    PackedQuantized as PackedQuantized,
    dequantize as dequantize,
    quantize as quantize,
)
from .._matrices import (
    MatrixSpec as MatrixSpec,
    Rank as Rank,
    Side as Side,
    Where as Where,
    is_hidden_matrix as is_hidden_matrix,
    matrix_shape as matrix_shape,
)
from .._moments import (
    MomentFields as MomentFields,
    Moments as Moments,
    register_moments as register_moments,
)
from .accumulate_gradients import (
    AccumulateGradientsState as AccumulateGradientsState,
    accumulate_gradients as accumulate_gradients,
)
from .bases import (
    SVD as SVD,
    Basis as Basis,
    CorrelationDescent as CorrelationDescent,
    DenseProjector as DenseProjector,
    EmaGram as EmaGram,
    EmaGramState as EmaGramState,
    Fixed as Fixed,
    Gaussian as Gaussian,
    Geodesic as Geodesic,
    GramEigh as GramEigh,
    MatrixBasis as MatrixBasis,
    Oja as Oja,
    OjaState as OjaState,
    Power as Power,
    Projector as Projector,
    Quantized as Quantized,
    QuantizedMatrix as QuantizedMatrix,
    RandomizedSVD as RandomizedSVD,
    RandomOrthonormal as RandomOrthonormal,
    RangeFinder as RangeFinder,
    RefreshContext as RefreshContext,
    RowProjector as RowProjector,
    SampledSVD as SampledSVD,
    ScaledRows as ScaledRows,
    SelectedRows as SelectedRows,
    Shared as Shared,
    Switch as Switch,
)
from .error_feedback import ErrorFeedback as ErrorFeedback
from .grow_basis import append_directions as append_directions, grow_basis as grow_basis
from .lifts import (
    Blend as Blend,
    Lift as Lift,
    Project as Project,
    Projected as Projected,
    Residual as Residual,
    SampledResidual as SampledResidual,
    ScaledGradient as ScaledGradient,
    ScaledResidual as ScaledResidual,
    SignResidual as SignResidual,
    Transformed as Transformed,
    limit_growth as limit_growth,
)
from .parameter_space import (
    AffineSubspace as AffineSubspace,
    random_subspace as random_subspace,
    trajectory_subspace as trajectory_subspace,
    zeroth_order_gradient as zeroth_order_gradient,
)
from .project_updates import (
    ProjectUpdatesState as ProjectUpdatesState,
    project_updates as project_updates,
)
from .schedules import (
    Adaptive as Adaptive,
    AdaptiveState as AdaptiveState,
    Always as Always,
    OnRequest as OnRequest,
    Periodic as Periodic,
    Schedule as Schedule,
    ScheduleContext as ScheduleContext,
)
from .sparse_residual import SparseResidual as SparseResidual
from .transport import (
    Align as Align,
    BasisChange as BasisChange,
    Keep as Keep,
    MomentTransport as MomentTransport,
    Reset as Reset,
    Rotate as Rotate,
    RotateVariance as RotateVariance,
    SeededReset as SeededReset,
)
