"""Adapters folded into the weights as training goes on, and begun anew."""

from ._parts import check_alike as check_alike
from .averages import Average as Average
from .fold import fold as fold
from .heads import merge_heads as merge_heads
from .moments import (
    KeepMoments as KeepMoments,
    MomentRule as MomentRule,
    PruneMoments as PruneMoments,
    ResetMoments as ResetMoments,
    RotateMoments as RotateMoments,
)
from .rules import Continue as Continue, FoldRule as FoldRule, Restart as Restart
from .schedules import relora_schedule as relora_schedule, rewarm as rewarm
from .starts import start_here as start_here
