from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .allocation import energies_left


def core_shape(spectra: Sequence[ArrayLike], budget: int) -> tuple[int, ...]:
    """The ranks of a Tucker form that keep most energy of all unfoldings in a budget.

    The maximum of ``Σ_k Σ_{i≤r_k} σ_i^{(k)2}`` where ``Π r_k + Σ n_k r_k`` is at most the
    budget and no rank is above the product of the others. The energies that are left out
    bound the squared error of the truncated higher-order SVD from above by their sum, from
    below by the largest. All shapes are tried, at a cost of the product of all axes but
    the longest.

    Args:
        spectra: for each axis the singular values ``(n_k,)`` of the unfolding, as
            :func:`lrjax.lowrank.unfolded_svd` gives them.
        budget: how many parameters core and factors may have.

    Returns:
        ``(r_1, …, r_d)``.

    Raises:
        ValueError: for a budget below rank 1 on every axis.

    Example:
        >>> from lrjax.lowrank import core_shape
        >>> core_shape([[5.0, 4.0, 0.1], [5.0, 4.0, 0.2], [6.4, 0.1, 0.1]], 25)
        (2, 2, 1)

    Reference:
        M. Ghadiri, M. Fahrbach, G. Fu, V. Mirrokni, "Approximately optimal core shapes for
        tensor decompositions" (2023), arXiv 2302.03886.
    """
    kept = [energies_left(f"axis {k}", s) for k, s in enumerate(spectra)]
    kept = [tails[0] - tails for tails in kept]  # by rank 0, 1, …
    sizes = [len(energy) - 1 for energy in kept]
    last = int(np.argmax(sizes))
    others = [k for k in range(len(sizes)) if k != last]
    ranks = np.meshgrid(*(np.arange(1, sizes[k] + 1) for k in others), indexing="ij")
    ranks = [r.ravel() for r in ranks]
    product = np.prod(ranks, axis=0, dtype=int)
    left = budget - sum(sizes[k] * r for k, r in zip(others, ranks, strict=True))
    most = np.minimum(left // (product + sizes[last]), np.minimum(sizes[last], product))
    fits = most >= 1
    for r in ranks:
        fits &= r <= product // r * most
    if not np.any(fits):
        raise ValueError(
            f"core_shape got a budget of {budget} parameters; rank 1 on every axis takes "
            f"{1 + sum(sizes)}."
        )
    energy = kept[last][np.where(fits, most, 0)]
    energy = energy + sum(kept[k][r] for k, r in zip(others, ranks, strict=True))
    best = int(np.argmax(np.where(fits, energy, -1)))
    shape = dict(zip(others, (int(r[best]) for r in ranks), strict=True))
    return tuple(int(most[best]) if k == last else shape[k] for k in range(len(sizes)))
