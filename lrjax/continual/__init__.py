"""Learning on without what was learned before being lost."""

from .cluster_pool import ClusterPool as ClusterPool
from .consolidation import Consolidation as Consolidation
from .gradient_basis import GradientBasis as GradientBasis
from .input_bases import InputBases as InputBases
from .low_rank_kalman import LowRankKalman as LowRankKalman
from .plateau_detector import PlateauDetector as PlateauDetector
from .recursive_least_squares import RecursiveLeastSquares as RecursiveLeastSquares
