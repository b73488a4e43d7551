"""Gradients of penalties on factors, added to those of the loss."""

from .add_anchor import AddAnchorState as AddAnchorState, add_anchor as add_anchor
from .add_frobenius_decay import add_frobenius_decay as add_frobenius_decay
from .add_imbalance_penalty import add_imbalance_penalty as add_imbalance_penalty
from .add_nuclear_norm import add_nuclear_norm as add_nuclear_norm
