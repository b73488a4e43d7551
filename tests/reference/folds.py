"""Moments of factors in another frame, and heads trained one after the other."""

import numpy as np


def turned_squares(v, old, new):
    """Squares of coordinates ``g · p_j`` in a new frame, coordinates taken as uncorrelated.

    ``v (k, r)``, frames ``(n, r)``. A new direction is ``Σ_j c_j p_j`` and a rest; the rest
    has the variance for each squared length that the old directions have in the mean.
    """
    v, old, new = (np.asarray(x, np.float64) for x in (v, old, new))
    out = np.zeros((v.shape[0], new.shape[1]))
    seen = np.mean(v / np.sum(old**2, axis=0), axis=1)
    for i in range(new.shape[1]):
        c = np.linalg.lstsq(old, new[:, i], rcond=None)[0]
        rest = new[:, i] - old @ c
        for k in range(v.shape[0]):
            out[k, i] = np.sum(c**2 * v[k]) + seen[k] * (rest @ rest)
    return out
