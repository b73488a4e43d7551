"""What matters least is frozen or set to zero."""

from .freeze_factors import (
    FreezeFactorsState as FreezeFactorsState,
    freeze_factors as freeze_factors,
)
from .prune_columns import (
    PruneColumnsState as PruneColumnsState,
    prune_columns as prune_columns,
)
from .prune_entries import (
    PruneEntriesState as PruneEntriesState,
    prune_entries as prune_entries,
)
from .sensitivity import Sensitivity as Sensitivity, cubic_schedule as cubic_schedule
