"""Learning on without what was learned before being lost."""

from .cluster_pool import ClusterPool as ClusterPool
from .gradient_basis import GradientBasis as GradientBasis
from .low_rank_kalman import LowRankKalman as LowRankKalman
from .recursive_least_squares import RecursiveLeastSquares as RecursiveLeastSquares
