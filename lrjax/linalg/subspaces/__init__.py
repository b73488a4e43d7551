"""Subspaces: angles, paths, means, differences, and how far samples turn them."""

from .angles import principal_angles as principal_angles
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
from .geodesic import geodesic as geodesic
from .overlap import subspace_overlap as subspace_overlap
from .pca_split_rotation import pca_split_rotation as pca_split_rotation
from .sampling_error import (
    SubspaceError as SubspaceError,
    subspace_error as subspace_error,
)
