from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ...._arguments import checks_trees
from ...._tree import check_alike, check_has_nodes, check_params, only_factors, put_factors
from ....linalg import increment, order_statistic, working_dtype
from .._factors import at


class PruneEntriesState(NamedTuple):
    """The state of :func:`prune_entries`.

    Attributes:
        count: the number of steps.
        mean: of the sensitivity of each number of a factor.
        inner: the state of the optimizer.
    """

    count: Int[Array, ""]
    mean: PyTree
    inner: Any


@checks_trees
def prune_entries(
    inner: optax.GradientTransformation,
    fraction: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.8,
) -> optax.GradientTransformationExtraArgs:
    """Keep the columns of factors sparse: zero all but the share that the loss hangs on.

    In each column of ``left = B (m, r)`` and of ``right = Aᵀ (n, r)``, that is in each row
    of ``A``, the numbers with the largest running average of ``|θ ∘ ∇θ|`` take the step of
    the inner optimizer; the others become zero. They have a gradient still and the
    optimizer keeps their moments, so they may come back. With shares ``a_k`` and ``b_k`` of
    zeros in row k of A and column k of B, the share of zeros in ``B A`` is at least
    ``1 + Σ_k (a_k + b_k − a_k b_k) − r``.

    Args:
        inner: an optimizer, with its learning rate.
        fraction: of a column that is kept, at least one number; a number or a schedule, as
            :func:`lrjax.transforms.cubic_schedule`. At 1 this is the inner optimizer.
        b1: of the running average.

    Returns:
        An optax transform around the inner one. Leaves that are no LowRank nodes take the
        inner step.

    Raises:
        ValueError: at ``init``, if there is no LowRank node.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.prune_entries(optax.sgd(0.1), 0.5)
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((4, 1)))
        >>> slope = lrjax.LowRank(jnp.array([[1.0], [2.0]]), jnp.arange(4.0)[:, None])
        >>> updates, _ = tx.update(slope, tx.init(x), x)
        >>> print(optax.apply_updates(x, updates).right[:, 0])
        [0.  0.  0.8 0.7]

    Reference:
        H. Wang et al., "RoseLoRA: row and column-wise sparse low-rank adaptation of
        pre-trained language model for knowledge editing and fine-tuning" (2024),
        arXiv:2406.10777.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        check_has_nodes("prune_entries", params)
        zero = lambda x: jnp.zeros(x.shape, working_dtype(x.dtype))
        mean = jax.tree.map(zero, only_factors(params))
        return PruneEntriesState(jnp.zeros((), jnp.int32), mean, inner.init(params))

    def update(updates, state, params=None, **extra):
        check_params("prune_entries", params)
        check_alike(updates, params)
        gradient, factors = only_factors(updates), only_factors(params)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        share = at(fraction, state.count)

        def average(old: Array, x: Array, g: Array) -> Array:
            sample = jnp.abs(x.astype(old.dtype) * g.astype(old.dtype))
            return jnp.asarray(b1 * old + (1 - b1) * sample, old.dtype)

        def step(u: Array, x: Array, score: Array) -> Array:
            return jnp.where(
                _largest(score, jnp.asarray(share, jnp.float32)), u, -x.astype(u.dtype)
            )

        mean = jax.tree.map(average, state.mean, factors, gradient)
        new = jax.tree.map(step, only_factors(updates), factors, mean)
        state = PruneEntriesState(increment(state.count), mean, inner_state)
        return put_factors(updates, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _largest(score: Float[Array, "*b n r"], share: Array) -> Array:
    """Which numbers of a column are among the largest; ties with the last one are in."""
    size = score.shape[-2]
    # Rounding must not make 20 a 21.
    kept = jnp.ceil(share * size * (1 - 1e-5))
    kept = jnp.clip(kept.astype(jnp.int32), 1, size)
    return score >= order_statistic(score, kept, axis=-2)
