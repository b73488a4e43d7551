"""Layers that hold their weight in factors, to put in the place of those of Equinox."""

from .compact import compact as compact, densify as densify
from .factorize import factorize as factorize
from .init_by_width import scale_init_by_width as scale_init_by_width
from .layers import (
    GrassmannHead as GrassmannHead,
    LowRankConv as LowRankConv,
    LowRankEmbedding as LowRankEmbedding,
    LowRankLinear as LowRankLinear,
    RecursiveBlocks as RecursiveBlocks,
    SparsePlusLowRankLinear as SparsePlusLowRankLinear,
    TuckerConv as TuckerConv,
    fold_kernel as fold_kernel,
    share_blocks as share_blocks,
    unfold_matrix as unfold_matrix,
)
from .replace_weight import replace_weight as replace_weight
from .report import FactorReport as FactorReport, LayerFactors as LayerFactors
