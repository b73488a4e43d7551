"""Sums over batches of what goes into layers."""

from .activations import (
    activation_statistics as activation_statistics,
    sums_of_inputs as sums_of_inputs,
)
from .statistic import InputStatistic as InputStatistic
from .stream import (
    Call as Call,
    check_repeatable as check_repeatable,
    over_batch as over_batch,
    summed as summed,
)
