"""Steps along the matrices and tensors of a rank, which may change on the way."""

from .add_condition_penalty import add_condition_penalty as add_condition_penalty
from .dynamical_low_rank import (
    DynamicalLowRankState as DynamicalLowRankState,
    dynamical_low_rank as dynamical_low_rank,
)
from .riemannian import riemannian as riemannian
