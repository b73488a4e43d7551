"""Learning on without what was learned before being lost."""

from .recursive_least_squares import RecursiveLeastSquares as RecursiveLeastSquares
