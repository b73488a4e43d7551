"""Low-rank adapters that live outside the model: build, bind, merge, train."""

from ._protocol import Adapter as Adapter, AdapterKind as AdapterKind
from .adapt import Adapters as Adapters, adapt as adapt
from .bind import (
    bind as bind,
    detach as detach,
    materialize as materialize,
    merge as merge,
    partition as partition,
)
from .lora import LoRA as LoRA, LoRAAdapter as LoRAAdapter
