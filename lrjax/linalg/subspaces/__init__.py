"""Statistics of subspaces: means, medians, differences, and how far samples turn them."""

from .averages import (
    SubspaceAverage as SubspaceAverage,
    subspace_mean as subspace_mean,
    subspace_median as subspace_median,
)
from .differences import (
    SubspaceDifference as SubspaceDifference,
    subspace_acceleration as subspace_acceleration,
    subspace_difference as subspace_difference,
)
from .overlap import subspace_overlap as subspace_overlap
from .sampling_error import (
    SubspaceError as SubspaceError,
    subspace_error as subspace_error,
)
