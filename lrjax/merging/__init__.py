"""Several changes of one model made one: on trees of LowRank nodes and of arrays."""

from .add_factors import add_factors as add_factors
from .aggregation import (
    CoordinateRule as CoordinateRule,
    FlagMean as FlagMean,
    GeometricMedian as GeometricMedian,
    GramRule as GramRule,
    Krum as Krum,
    Mean as Mean,
    TrimmedMean as TrimmedMean,
    aggregate_gradients as aggregate_gradients,
    flag_mean as flag_mean,
    geometric_median as geometric_median,
)
from .cluster_units import cluster_units as cluster_units
from .column_network import (
    ColumnNetwork as ColumnNetwork,
    column_loss as column_loss,
)
from .elect_signs import elect_signs as elect_signs, ties as ties
from .fisher_average import fisher_average as fisher_average
from .masked_sum import concrete_mask as concrete_mask, masked_sum as masked_sum
from .sparsify import drop as drop, trim as trim
from .spectral_sums import (
    isotropic_sum as isotropic_sum,
    orthogonalized_sum as orthogonalized_sum,
)
from .weighted_sum import weighted_sum as weighted_sum
