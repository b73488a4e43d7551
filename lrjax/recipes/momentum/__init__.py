"""Optimizers that compress the momentum, not the gradient."""

from .dion import dion as dion
