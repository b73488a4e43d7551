"""Statistics of gradients and activations, for kinds that start from data."""

from .gradients import gradient_statistics as gradient_statistics
from .ranks import ranks_by_variance as ranks_by_variance
