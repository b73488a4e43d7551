"""Numbers that say how a low-rank model is doing."""

from .balance import balance_drift as balance_drift, imbalance as imbalance
