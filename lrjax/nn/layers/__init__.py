"""Layers that hold their weight in factors."""

from ._weights import (
    Form as Form,
    Node as Node,
    check_form as check_form,
    node_of as node_of,
)
from .conv import LowRankConv as LowRankConv
from .embedding import LowRankEmbedding as LowRankEmbedding
from .folding import (
    Scheme as Scheme,
    fold_kernel as fold_kernel,
    taps_of_outputs as taps_of_outputs,
    unfold_matrix as unfold_matrix,
)
from .grassmann_head import GrassmannHead as GrassmannHead
from .linear import LowRankLinear as LowRankLinear
from .recursive import RecursiveBlocks as RecursiveBlocks, share_blocks as share_blocks
from .sparse_plus_low_rank import SparsePlusLowRankLinear as SparsePlusLowRankLinear
from .tucker_conv import TuckerConv as TuckerConv
