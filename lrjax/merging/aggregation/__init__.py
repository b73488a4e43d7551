"""Changes and gradients of many workers made one, some of which may be wrong."""

from .aggregate_gradients import aggregate_gradients as aggregate_gradients
from .aggregation_rules import (
    CoordinateRule as CoordinateRule,
    FlagMean as FlagMean,
    GeometricMedian as GeometricMedian,
    GramRule as GramRule,
    Krum as Krum,
    Mean as Mean,
    TrimmedMean as TrimmedMean,
)
from .robust_mean import flag_mean as flag_mean, geometric_median as geometric_median
