"""Many adapters of one model."""

from .combine import combine as combine
from .gates import (
    Arrow as Arrow,
    Gate as Gate,
    GateKind as GateKind,
    LearnedGates as LearnedGates,
)
from .mixture import Mixture as Mixture, mix as mix
from .rounds import federated_round as federated_round
from .select import select as select
from .stack import Stack as Stack, stack as stack, swap as swap
from .weights import (
    feature_weights as feature_weights,
    softmax_weights as softmax_weights,
)
