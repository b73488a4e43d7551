"""Factors kept orthonormal, balanced, or on the manifold of their rank."""

from .keep_orthonormal import keep_orthonormal as keep_orthonormal
from .landing_field import landing_field as landing_field
from .rebalance import RebalanceState as RebalanceState, rebalance as rebalance
from .retract import retract as retract
