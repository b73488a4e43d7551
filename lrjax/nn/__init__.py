"""Layers that hold their weight in factors, to put in the place of those of Equinox."""

from .conv import LowRankConv as LowRankConv
from .embedding import LowRankEmbedding as LowRankEmbedding
from .folding import fold_kernel as fold_kernel, unfold_matrix as unfold_matrix
from .linear import LowRankLinear as LowRankLinear
from .tucker_conv import TuckerConv as TuckerConv
