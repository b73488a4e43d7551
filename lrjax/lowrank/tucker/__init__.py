"""Tensors of low multilinear rank: their form, their ranks, their tangents."""

from .form import (
    TuckerForm as TuckerForm,
    higher_order_svd as higher_order_svd,
    multiply_axes as multiply_axes,
    tucker_inner as tucker_inner,
    unfold as unfold,
    unfolded_svd as unfolded_svd,
)
from .ranks import tucker_augment as tucker_augment, tucker_truncate as tucker_truncate
from .tangent import tucker_tangent as tucker_tangent
