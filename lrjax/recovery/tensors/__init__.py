"""Tensors of low multilinear rank, from entries that are partly missing or wrong."""

from .fit_tensor import (
    fit_robust_tensor as fit_robust_tensor,
    fit_tensor_completion as fit_tensor_completion,
)
from .tensor_fit import TensorFit as TensorFit
