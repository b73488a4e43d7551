"""Many adapters of one model."""

from .combine import combine as combine
