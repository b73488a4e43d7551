"""Subspaces of all parameters of a model at once, and gradients from losses alone."""

from .affine_subspace import AffineSubspace as AffineSubspace
from .random_subspace import random_subspace as random_subspace
from .trajectory_subspace import trajectory_subspace as trajectory_subspace
from .zeroth_order_gradient import zeroth_order_gradient as zeroth_order_gradient
