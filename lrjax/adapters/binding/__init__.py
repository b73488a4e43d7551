"""Adapters and a model: made for it, bound to it, merged into it and taken out again."""

from ._stacks import filled as filled, joined as joined
from .adapt import KindRule as KindRule, adapt as adapt, placed as placed
from .as_lora import (
    as_lora as as_lora,
    beyond_factors as beyond_factors,
    change_errors as change_errors,
    stacked_factors as stacked_factors,
)
from .bind import (
    adapted_sites as adapted_sites,
    bias_change as bias_change,
    bind as bind,
    dense_change as dense_change,
    detach as detach,
    fitting as fitting,
    map_adapted as map_adapted,
    materialize as materialize,
    merge as merge,
)
from .bound import prepared as prepared
from .unmerge import unmerge as unmerge
