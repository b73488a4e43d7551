"""Layers that hold their weight in factors, to put in the place of those of Equinox."""

from .compact import compact as compact, densify as densify
from .conv import LowRankConv as LowRankConv
from .embedding import LowRankEmbedding as LowRankEmbedding
from .factorize import factorize as factorize
from .folding import fold_kernel as fold_kernel, unfold_matrix as unfold_matrix
from .grassmann_head import GrassmannHead as GrassmannHead
from .init_by_width import scale_init_by_width as scale_init_by_width
from .linear import LowRankLinear as LowRankLinear
from .recursive import RecursiveBlocks as RecursiveBlocks, share_blocks as share_blocks
from .replace_weight import replace_weight as replace_weight
from .report import FactorReport as FactorReport, LayerFactors as LayerFactors
from .sparse_plus_low_rank import SparsePlusLowRankLinear as SparsePlusLowRankLinear
from .tucker_conv import TuckerConv as TuckerConv
