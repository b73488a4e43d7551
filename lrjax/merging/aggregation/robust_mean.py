from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ...linalg import working_dtype
from ...lowrank import LowRank, inner
from .._changes import Weights, checked_weights, even, map_changes, materialized
from ..weighted_sum import weighted_sum
from .aggregation_rules import FlagMean, GeometricMedian


def geometric_median(
    changes: Sequence[PyTree], weights: Weights | None = None, *, steps: int = 50
) -> PyTree:
    """The geometric median of trees: less than half of them may be anything.

        argmin_Δ Σ_k α_k ‖Δ − Δ_k‖

    over all arrays of a tree together, by Weiszfeld's iteration ``w_k ∝ α_k/‖Δ − Δ_k‖``,
    ``Δ = Σ_k w_k Δ_k``. It needs the inner products of the trees alone, ``(k, k)``; those
    of nodes come from their factors, and the median has them beside each other as
    :func:`weighted_sum` does.

    Args:
        changes: trees of one structure: gradients of workers, or changes of clients.
        weights: ``α (k,)``, not negative; by default all alike. Less than half of their
            sum may be that of trees that are anything.
        steps: of the iteration.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: as :func:`weighted_sum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = [jnp.array([1.0, 0.0]), jnp.array([0.9, 0.1]), jnp.array([-99.0, 50.0])]
        >>> bool(abs(lrjax.merging.geometric_median(x) - x[1]).max() < 0.1)
        True

    Reference:
        K. Pillutla, S. M. Kakade, Z. Harchaoui, "Robust aggregation for federated learning"
        (2019), arXiv 1912.13445.
    """
    own = checked_weights("geometric_median", weights, changes, even)
    return _by_gram("geometric_median", changes, GeometricMedian(steps), own)


def flag_mean(changes: Sequence[PyTree], *, rank: int = 1, steps: int = 1) -> PyTree:
    """The mean direction of trees within the subspace that most of them are near to.

    Every tree is a unit vector ``x_k``. With the leading left singular vectors Y, ``rank``
    of them, of ``[a_1 x_1, a_2 x_2, …]`` and ``a_k = |min(rank, 1) − ‖Yᵀ x_k‖²|^(-1/4)``,
    from ones and reweighted ``steps`` times, it is ``Y Yᵀ Σ_k x_k / (number of trees)``
    times the median of the lengths that the trees had. A few trees that are anything turn
    it little so long as ``rank`` is at most the rank of the honest ones; its length is not
    theirs to decide.

    Args:
        changes: trees of one structure: gradients of workers, or changes of clients.
        rank: of the subspace; keep it at 1 if in doubt, as every further direction may be
            that of an outlier.
        steps: of reweighting.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: for a rank that is not between 1 and the number of trees, and as
            :func:`weighted_sum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = [jnp.array([1.0, 0.0]), jnp.array([0.9, 0.1]), jnp.array([0.0, 500.0])]
        >>> mean = lrjax.merging.flag_mean(x)
        >>> bool(mean[0] > 5 * mean[1])
        True

    Reference:
        H. Almasi, H. Mishra, B. Vamanan, S. N. Ravi, "Flag aggregator: scalable distributed
        training under failures and augmented losses using convex optimization" (2023),
        arXiv 2302.05865.
    """
    return _by_gram("flag_mean", changes, FlagMean(rank, steps))


def _by_gram(
    owner: str, changes: Sequence[PyTree], rule: FlagMean | GeometricMedian, *own: Array
) -> PyTree:
    """The sum of trees with weights that follow from their inner products."""
    rule.check(len(changes))
    products = []

    def note(path: str, leaves: list[Any], _: Array) -> Any:
        del path
        products.append(_products(leaves))
        return leaves[0]

    map_changes(owner, note, changes, even(len(changes)))
    if not products:
        return weighted_sum(changes)
    gram: Float[Array, "k k"] = sum(products[1:], products[0])
    return weighted_sum(changes, rule.weights(gram, *own))


def _products(leaves: list[Any]) -> Float[Array, "k k"]:
    if all(isinstance(leaf, LowRank) for leaf in leaves):
        dtype = working_dtype(jnp.result_type(*(leaf.dtype for leaf in leaves)))
        wide = [jax.tree.map(lambda x: x.astype(dtype), leaf) for leaf in leaves]
        rows = [[jnp.sum(inner(x, y)) for y in wide] for x in wide]
        return jnp.array(rows)
    arrays = [materialized(leaf) for leaf in leaves]
    dtype = working_dtype(jnp.result_type(*arrays))
    flat = jnp.stack([x.astype(dtype).ravel() for x in arrays])
    return jnp.einsum("ki,li->kl", flat, flat, precision=lax.Precision.HIGHEST)
