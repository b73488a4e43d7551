"""The natural gradient of a window of gradients, with dense matrices."""

import numpy as np


def windowed(grads, window, damping, *, relative):
    """``(λI + GᵀG/m)⁻¹ g`` for each gradient, with the inverse kept by rank-one updates.

    Those of the paper: one for the gradient that comes in, one for that which falls out.
    """
    n = grads.shape[1]
    held = np.zeros((window, n))
    out = []
    for t, g in enumerate(grads):
        held[t % window] = g
        ridge = damping * np.sum(held**2) / window**2 if relative else damping
        inverse = np.eye(n) / ridge
        for h in held:
            image = inverse @ h
            inverse = inverse - np.outer(image, image) / (window + h @ image)
        out.append(inverse @ g)
    return np.stack(out)
