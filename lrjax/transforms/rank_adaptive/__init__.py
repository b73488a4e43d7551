"""Transforms that choose which numbers are in use: shrink, prune and freeze."""

from .freeze_factors import (
    FreezeFactorsState as FreezeFactorsState,
    freeze_factors as freeze_factors,
)
from .prune_entries import (
    PruneEntriesState as PruneEntriesState,
    prune_entries as prune_entries,
)
from .sensitivity import Sensitivity as Sensitivity, cubic_schedule as cubic_schedule
from .shrink import shrink as shrink
from .shrink_singular_values import shrink_singular_values as shrink_singular_values
