"""Which matrix of a kernel to cut, in how many groups of channels, and to which rank."""

import bisect
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..linalg import truncated_svd
from ..lowrank import LowRank
from ..nn import fold_kernel


Scheme = Literal["inputs", "outputs", "first", "last"]  # of fold_kernel


class Folding(NamedTuple):
    """How a weight is decomposed.

    Attributes:
        scheme: of :func:`lrjax.nn.fold_kernel`.
        groups: of input channels, each with factors of its own.
        rank: of each of them.
    """

    scheme: Scheme
    groups: int
    rank: int


def minimax_foldings(
    weights: Mapping[str, Float[Array, "out in *taps"]],
    budget: int,
    *,
    schemes: tuple[Scheme, ...] = get_args(Scheme),
    groups: tuple[int, ...] = (1, 2, 4, 8),
) -> dict[str, Folding]:
    """The decompositions with the least largest error of a layer, within a budget.

    A kernel is folded into a matrix in one of four ways, its input channels are split into
    k groups, and each of the blocks ``W_1, …, W_k`` is cut at one rank j: ``j (k m + n)``
    numbers, a grouped convolution and one that mixes. The error is relative to the norm of
    the operator::

        ε = max_g σ_{j+1}(W_g) / ‖W‖₂        ‖W − Ŵ‖₂ ≤ √k ε ‖W‖₂

    For every level ε each layer takes the choice of fewest numbers, the dense form among
    them; the level is the least that the budget allows, found by bisection. So there are no
    rounds and no starts: the result is the best of all choices. With one scheme and one
    group it is :func:`lrjax.lowrank.minimax_ranks`.

    Args:
        weights: by path, ``(out, in)`` of linear layers and ``(out, in, k_1, …)`` of
            convolutions without groups.
        budget: how many numbers all of them may have.
        schemes: the foldings to choose from; matrices have one.
        groups: numbers of groups to choose from, those that divide the input channels.

    Returns:
        ``{path: Folding}`` of the layers in factors. Those left out stay dense.

    Raises:
        ValueError: for a budget that is out of reach, or no choice for a layer.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> vertical, horizontal = jax.random.normal(jax.random.key(0), (2, 2, 8, 3))
        >>> kernel = jnp.einsum("roy,rix->oiyx", vertical, horizontal)
        >>> lrjax.compression.minimax_foldings({"conv": kernel}, 100, groups=(1,))
        {'conv': Folding(scheme='first', groups=1, rank=2)}

    Reference:
        L. Liebenwein, A. Maalouf, O. Gal, D. Feldman, D. Rus, "Compressing neural networks:
        towards determining the optimal layer-wise decomposition" (2021), arXiv 2107.11442.
    """
    choices = {path: _choices(path, w, schemes, groups) for path, w in weights.items()}
    dense = {path: math.prod(w.shape) for path, w in weights.items()}
    every = [errors for own in choices.values() for _, errors in own.values()]
    levels = np.unique(np.concatenate(every))[::-1]

    def best(path: str, level: float) -> tuple[int, Folding | None]:
        """The fewest numbers at a level; ``None`` for the dense form."""
        found = [
            (int(np.sum(errors > level)) + 1, *key, each)
            for key, (each, errors) in choices[path].items()
        ]
        rank, scheme, k, each = min(found, key=lambda one: one[0] * one[3])
        if rank * each >= dense[path]:
            return dense[path], None
        return rank * each, Folding(scheme, k, rank)

    cost = lambda level: sum(best(path, level)[0] for path in weights)
    place = bisect.bisect_right(levels, budget, key=cost) - 1
    if place < 0:
        raise ValueError(
            f"minimax_foldings got a budget of {budget} numbers; the smallest factors of "
            f"all layers take {cost(levels[0])}."
        )
    found = {path: best(path, levels[place])[1] for path in weights}
    return {path: folding for path, folding in found.items() if folding is not None}


def folded_factors(weight: Float[Array, "out in *taps"], folding: Folding) -> LowRank:
    """The factors of the blocks of a folded weight.

    Args:
        weight: as of :func:`minimax_foldings`.
        folding: how it is decomposed.

    Returns:
        ``(groups, m, n / groups)``: the blocks side by side are the folded matrix. In
        float32 or wider, balanced.

    Raises:
        ValueError: for groups that do not divide the input channels, or a rank out of
            range.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> folding = lrjax.compression.Folding("inputs", 2, 1)
        >>> lrjax.compression.folded_factors(jnp.ones((3, 4, 5)), folding).shape
        (2, 3, 10)
    """
    u, values, v = truncated_svd(
        _blocks(weight, folding.scheme, folding.groups), folding.rank
    )
    root = jnp.sqrt(values)[..., None, :]
    return LowRank(u * root, v * root)


def _choices(
    path: str, weight: Array, schemes: tuple[Scheme, ...], groups: tuple[int, ...]
) -> dict[tuple[Scheme, int], tuple[int, np.ndarray]]:
    """What each unit of rank costs, and the errors at rank 1, 2, … of every choice."""
    found = {}
    for scheme in schemes[: None if weight.ndim > 2 else 1]:
        norm = None
        for k in (1, *groups):
            if weight.shape[1] % k:
                continue
            blocks = np.asarray(_blocks(weight, scheme, k), np.float64)
            values = np.linalg.svd(blocks, compute_uv=False)
            norm = values.max() if norm is None else norm
            errors = values.max(0) / (norm if norm > 0 else 1.0)
            if k in groups:
                each = k * blocks.shape[-2] + k * blocks.shape[-1]
                found[scheme, k] = each, np.append(errors[1:], 0.0)
    if not found:
        raise ValueError(
            f"minimax_foldings has no choice for {path!r} of shape {weight.shape}: none of "
            f"the groups {groups} divides its input channels."
        )
    return found


def _blocks(weight: Array, scheme: Scheme, groups: int) -> Array:
    """The folded matrix, its columns in groups of input channels."""
    if weight.shape[1] % groups:
        raise ValueError(
            f"a weight of shape {weight.shape} has no {groups} groups of input channels."
        )
    matrix = fold_kernel(weight, scheme) if weight.ndim > 2 else weight
    m, n = matrix.shape
    return jnp.moveaxis(matrix.reshape(m, groups, n // groups), 1, 0)
