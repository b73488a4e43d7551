"""The methods of PEFT that are read and written; the first that takes an adapter is it."""

from ._format import Format
from .adalora import AdaLora
from .block import Miss
from .hadamard import Hira, Ia3, Loha
from .kronecker import Lokr
from .lora import Lora
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
