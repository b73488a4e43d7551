"""The methods of PEFT that are read and written; the first that takes an adapter is it."""

from ._format import Format as Format, Part as Part, misfit as misfit
from ._layout import (
    Names as Names,
    check_convolution as check_convolution,
    pair_as_stored as pair_as_stored,
    read_pair as read_pair,
)
from .adalora import AdaLora
from .block import Miss
from .hadamard import Hira, Ia3, Loha
from .kronecker import Lokr
from .lora import (
    Lora as Lora,
    as_factors as as_factors,
    expert_shapes_fit as expert_shapes_fit,
    factors_of as factors_of,
)
from .randlora import RandLora
from .rotation import Oft
from .vera import Vera


FORMATS: tuple[Format, ...] = (
    *(Vera(), AdaLora(), Hira(), Loha(), Lokr(), Ia3(), Miss(), Oft()),
    RandLora(),
    Lora(),
)
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
