"""Many adapters of one model."""

from .combine import combine as combine
from .rounds import federated_round as federated_round
from .select import select as select
from .stack import Stack as Stack, stack as stack, swap as swap
