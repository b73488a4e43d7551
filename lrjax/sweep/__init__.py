"""Run a function on a whole grid of hyper-parameters, vectorized, with labelled results."""

from .sweep import sweep as sweep
