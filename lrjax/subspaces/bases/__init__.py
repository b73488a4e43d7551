"""Which subspace: the bases, by how they are found."""

from .basis import (
    Basis as Basis,
    DenseProjector as DenseProjector,
    MatrixBasis as MatrixBasis,
    Projector as Projector,
    RefreshContext as RefreshContext,
    RowProjector as RowProjector,
)
from .decompositions import (
    SVD as SVD,
    GramEigh as GramEigh,
    RandomizedSVD as RandomizedSVD,
    RangeFinder as RangeFinder,
    SampledSVD as SampledSVD,
)
from .given import Fixed as Fixed, Switch as Switch
from .power import Power as Power
from .quantized import Quantized as Quantized, QuantizedMatrix as QuantizedMatrix
from .sampled import (
    Gaussian as Gaussian,
    RandomOrthonormal as RandomOrthonormal,
    ScaledRows as ScaledRows,
    SelectedRows as SelectedRows,
)
from .shared import Shared as Shared
from .tracking import (
    CorrelationDescent as CorrelationDescent,
    EmaGram as EmaGram,
    EmaGramState as EmaGramState,
    Geodesic as Geodesic,
    Oja as Oja,
    OjaState as OjaState,
)
