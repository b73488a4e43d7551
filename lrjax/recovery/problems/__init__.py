"""What is measured of a matrix, how, with which loss, and how hard that is."""

from .constructors import (
    matrix_completion as matrix_completion,
    matrix_sensing as matrix_sensing,
    observed_entries as observed_entries,
    phase_retrieval as phase_retrieval,
    robust_pca as robust_pca,
)
from .isometry import (
    MixedNormRIP as MixedNormRIP,
    SignRIP as SignRIP,
    mixed_norm_rip as mixed_norm_rip,
    sign_rip as sign_rip,
)
from .losses import (
    L1 as L1,
    Huber as Huber,
    Objective as Objective,
    Quantile as Quantile,
    Squared as Squared,
)
from .operators import (
    DenseSensing as DenseSensing,
    Entries as Entries,
    Identity as Identity,
    Masked as Masked,
    Operator as Operator,
    RankOneSensing as RankOneSensing,
)
from .problem import Problem as Problem
from .spiked import SpikedModel as SpikedModel, spiked_model as spiked_model
