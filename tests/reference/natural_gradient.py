"""The natural gradient of a window of gradients, with dense matrices."""

import numpy as np


def windowed(grads, window, damping, *, relative):
    """``(λI + GᵀG/m)⁻¹ g`` for each gradient, times λ if that is relative.

    The inverse is that of one rank-one update for each gradient, as in the paper.
    """
    n = grads.shape[1]
    held = np.zeros((window, n))
    out = []
    for t, g in enumerate(grads):
        held[t % window] = g
        ridge = damping * np.sum(held**2) / window**2 if relative else damping
        scale = ridge if relative else 1.0
        inverse = np.eye(n) / ridge
        for h in held:
            image = inverse @ h
            inverse = inverse - np.outer(image, image) / (window + h @ image)
        out.append(scale * inverse @ g)
    return np.stack(out)
