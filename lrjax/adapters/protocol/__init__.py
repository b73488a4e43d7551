"""What an adapter is: made for a site, ready for calls; pools, and trees of all."""

from .adapter import (
    Adapter as Adapter,
    AdapterKind as AdapterKind,
    Around as Around,
    AroundKind as AroundKind,
    Ready as Ready,
    innermost as innermost,
    is_adapter as is_adapter,
    is_partial as is_partial,
    trained as trained,
    with_stopped_gradients as with_stopped_gradients,
)
from .pool import (
    BasisPool as BasisPool,
    FactorPool as FactorPool,
    Pool as Pool,
    PoolRows as PoolRows,
    VectorPool as VectorPool,
)
from .ready import (
    Added as Added,
    Beside as Beside,
    Copied as Copied,
    Gained as Gained,
    GainedInputs as GainedInputs,
    OwnBias as OwnBias,
    PerInput as PerInput,
    Product as Product,
    Structured as Structured,
    Sum as Sum,
    Toward as Toward,
    Whole as Whole,
)
from .tree import Adapters as Adapters, map_adapters as map_adapters, partition as partition
