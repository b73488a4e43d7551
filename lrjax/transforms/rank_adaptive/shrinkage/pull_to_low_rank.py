from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._matrices import Where, check_real, map_init, map_matrices
from ...._tree import check_params
from ....linalg import increment, map_singular_values, penalized_rank, working_dtype
from ..._checks import check_non_negative
from ...wrappers.on_matrices import put_beside_nodes, without_nodes


class PullToLowRankState(NamedTuple):
    """The state of :func:`pull_to_low_rank`.

    Attributes:
        count: the number of steps.
        penalty: how hard the weights are pulled, μ.
        target: the matrix of low rank that each weight is pulled to, Θ.
        multiplier: the multiplier of ``W = Θ``, Λ.
    """

    count: Int[Array, ""]
    penalty: Float[Array, ""]
    target: PyTree
    multiplier: PyTree


@checks_trees
def pull_to_low_rank(
    rank_weight: ArrayLike,
    *,
    penalty: ArrayLike = 1e-3,
    penalty_growth: ArrayLike = 1.1,
    period: int | Array = 100,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Pull dense weights to matrices of low rank whose ranks are learned with them.

    The augmented Lagrangian of ``loss + rank_weight Σ r (m + n)`` over weights ``W`` and
    matrices ``Θ`` of rank ``r`` with ``W = Θ``: the steps in between train the loss, and

        G ← G + μ (W − Θ) − Λ

    Every ``period`` steps, and at the first, weights are compressed, one SVD each::

        Θ ← the matrix of rank r nearest to W − Λ/μ,
            r = argmin_r rank_weight · r (m + n) + ½ μ Σ_{i>r} σ_i²
        Λ ← Λ − μ (W − Θ),  μ ← penalty_growth · μ

    with no Λ at the first. In the end W and Θ are one, and ``nn.factorize`` loses nothing.
    Place it first in the chain. State: two matrices for each weight.

    Args:
        rank_weight: what a parameter in factors costs, in the units of the loss.
        penalty: the first μ.
        penalty_growth: from one compression to the next, above 1.
        period: how many steps from one compression to the next; may be traced.
        where: which leaves, and which axes are rows; see
            :func:`lrjax.transforms.on_matrices`.

    Returns:
        An optax transform; ``update`` needs ``params``.

    Raises:
        ValueError: for a negative weight or penalty, or a period below 1; at ``init``, if
            ``where`` chooses no leaf, or one that is no matrix; at ``update``, without
            ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 1.0, 0.3]))
        >>> loss = lambda w: jnp.sum((w - target) ** 2) / 2
        >>> pull = lrjax.pull_to_low_rank(
        ...     0.02, penalty=0.1, period=5, where=lambda path, shape: True)
        >>> tx = optax.chain(pull, optax.sgd(0.2))
        >>> step = jax.jit(lambda w, s: tx.update(jax.grad(loss)(w), s, w))
        >>> w = target
        >>> state = tx.init(w)
        >>> for _ in range(150):
        ...     updates, state = step(w, state)
        ...     w = optax.apply_updates(w, updates)
        >>> print(lrjax.metrics.numerical_rank(w, 1e-2))
        2

    Reference:
        Y. Idelbayev, M. Á. Carreira-Perpiñán, "Low-rank compression of neural nets:
        learning the rank of each layer" (2020), CVPR.
    """
    check_non_negative("pull_to_low_rank", "rank_weight", rank_weight)
    check_non_negative("pull_to_low_rank", "penalty", penalty)
    if not isinstance(period, Tracer) and period < 1:
        raise ValueError(
            f"pull_to_low_rank needs a period of at least one step, got {period}."
        )

    def start(leaf, x):
        zeros = jnp.zeros_like(leaf.view(x), working_dtype(x.dtype))
        return zeros, zeros

    def init(params):
        check_real("pull_to_low_rank", params)
        dense = without_nodes(params)
        target, multiplier = map_init("pull_to_low_rank", where, start, dense, 2)
        mu = jnp.asarray(penalty, jnp.float32)
        return PullToLowRankState(jnp.zeros((), jnp.int32), mu, target, multiplier)

    def compress(params, state):
        first = state.count == 0
        mu = state.penalty

        def one(leaf, w, _, multiplier):
            wide = leaf.view(w).astype(multiplier.dtype)
            kept = lambda values: _cut(values, wide.shape, rank_weight / mu)
            target = map_singular_values(kept, wide - multiplier / mu)
            new = multiplier - mu * (wide - target)
            return w, target, jnp.where(first, 0, new).astype(multiplier.dtype)

        _, target, multiplier = map_matrices(
            "pull_to_low_rank", where, one, params, state.target, state.multiplier
        )
        mu = jnp.where(first, mu, mu * jnp.asarray(penalty_growth, mu.dtype))
        return PullToLowRankState(state.count, mu, target, multiplier)

    def update(updates, state, params=None, **extra):
        del extra
        check_params("pull_to_low_rank", params)
        dense = without_nodes(params)
        due = any_member(state.count % period == 0)
        state = lax.cond(due, lambda s: compress(dense, s), lambda s: s, state)

        def pull(leaf, g, w, target, multiplier):
            wide = leaf.view(w).astype(target.dtype)
            slope = state.penalty * (wide - target) - multiplier
            moved = (leaf.view(g).astype(target.dtype) + slope).astype(g.dtype)
            return (leaf.restore(moved, g),)

        (new,) = map_matrices(
            "pull_to_low_rank",
            where,
            pull,
            without_nodes(updates),
            dense,
            state.target,
            state.multiplier,
            rest=lambda g, *others: (g,),
            results=1,
        )
        state = state._replace(count=increment(state.count))
        return put_beside_nodes(updates, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _cut(values: Array, shape: tuple[int, ...], rank_weight: ArrayLike) -> Array:
    """Zeros after the singular values that are worth their parameters."""
    rank = penalized_rank(values, shape, rank_weight)[..., None]
    place = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jnp.where(place < rank, values, 0)
