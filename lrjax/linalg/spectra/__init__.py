"""What is made of singular values: thresholds, maps, and estimates without noise."""

from .optimal_shrinkage import optimal_shrinkage as optimal_shrinkage
from .singular_value_maps import (
    energy_mask as energy_mask,
    map_singular_values as map_singular_values,
    penalized_rank as penalized_rank,
)
from .thresholds import (
    firm_threshold as firm_threshold,
    hard_threshold as hard_threshold,
    keep_largest as keep_largest,
    lq_threshold as lq_threshold,
    order_statistic as order_statistic,
    soft_threshold as soft_threshold,
)
