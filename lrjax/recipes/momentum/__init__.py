"""Optimizers that compress the momentum, not the gradient."""

from .dion import dion as dion
from .mofasgd import mofasgd as mofasgd
from .power_sgd import power_sgd as power_sgd
