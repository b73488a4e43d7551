"""Large matrices by a few products, rows or random numbers."""

from .fastfood import (
    Fastfood as Fastfood,
    fastfood as fastfood,
    walsh_hadamard as walsh_hadamard,
)
from .nystrom import (
    nystrom as nystrom,
    nystrom_preconditioner as nystrom_preconditioner,
    nystrom_sketch as nystrom_sketch,
)
from .row_sampling import (
    RowSample as RowSample,
    Sensitivities as Sensitivities,
    leverage_scores as leverage_scores,
    lewis_weights as lewis_weights,
    lp_sensitivities as lp_sensitivities,
    sample_rows as sample_rows,
)
