"""Momentum in few numbers, sent in few numbers, or of what changes slowly."""

from .amplify_slow import (
    AmplifySlowState as AmplifySlowState,
    AmplifySlowWindowState as AmplifySlowWindowState,
    amplify_slow as amplify_slow,
)
from .compress_momentum import (
    CompressMomentumState as CompressMomentumState,
    compress_momentum as compress_momentum,
    data_parallel_specs as data_parallel_specs,
)
from .factored_momentum import (
    FactoredMomentumState as FactoredMomentumState,
    factored_momentum as factored_momentum,
)
