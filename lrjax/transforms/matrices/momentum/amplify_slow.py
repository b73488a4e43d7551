from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Int, PyTree

from ...._arguments import checks_trees
from ...._moments import register_moments
from ....linalg import increment, working_dtype


class AmplifySlowState(NamedTuple):
    """The state of :func:`amplify_slow` with an exponential average.

    Attributes:
        count: the number of steps.
        slow: the average.
    """

    count: Int[Array, ""]
    slow: PyTree


class AmplifySlowWindowState(NamedTuple):
    """The state of :func:`amplify_slow` with a window.

    Attributes:
        count: the number of steps.
        recent: the last gradients, along a new first axis.
    """

    count: Int[Array, ""]
    recent: PyTree


register_moments(AmplifySlowState, first="slow")


@checks_trees
def amplify_slow(
    weight: ArrayLike = 2.0, decay: ArrayLike = 0.98, *, window: int | None = None
) -> optax.GradientTransformation:
    """Grokfast: amplify the slowly varying part of the gradient.

    ``h ← α h + (1−α) G`` from ``h = G`` at the first step, ``U = G + λ h``. With a window
    ``h`` is the mean of the last ``window`` gradients, and zero until there are that many.
    It goes before the optimizer. In a subspace the average takes ``r n`` numbers instead
    of ``m n``: ``project_updates(amplify_slow(), basis, lift=subspaces.Residual(),
    carry=subspaces.Rotate())``.

    Args:
        weight: ``λ``.
        decay: ``α``.
        window: length of the window; None for the exponential average.

    Returns:
        The transform.

    Raises:
        ValueError: for a window below one step.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.amplify_slow(2.0)
        >>> print(tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))[0])
        [3.]

    Reference:
        J. Lee, B. G. Kang, K. Kim, K. M. Lee, "Grokfast: accelerated grokking by
        amplifying slow gradients" (2024), arXiv 2405.20233.
    """
    if window is not None and window < 1:
        raise ValueError(f"amplify_slow needs a window of at least one step, got {window}.")
    start = lambda: jnp.zeros((), jnp.int32)
    amplified = lambda updates, slow: jax.tree.map(
        lambda g, h: (g + weight * h).astype(g.dtype), updates, slow
    )

    zeros = lambda p: jnp.zeros_like(p, working_dtype(p.dtype))

    def init_average(params):
        return AmplifySlowState(start(), jax.tree.map(zeros, params))

    def average(updates, state, params=None):
        del params
        kept = jnp.where(state.count > 0, decay, 0)
        mix = lambda g, h: (kept * h + (1 - kept) * g).astype(h.dtype)
        slow = jax.tree.map(mix, updates, state.slow)
        new = AmplifySlowState(increment(state.count), slow)
        return amplified(updates, slow), new

    if window is None:
        return optax.GradientTransformation(init_average, average)

    def init_window(params):
        empty = lambda p: jnp.broadcast_to(zeros(p), (window, *p.shape))
        return AmplifySlowWindowState(start(), jax.tree.map(empty, params))

    def slide(updates, state, params=None):
        del params
        place = state.count % window
        put = lambda g, old: lax.dynamic_update_index_in_dim(
            old, g.astype(old.dtype), place, axis=0
        )
        recent = jax.tree.map(put, updates, state.recent)
        count = increment(state.count)
        full = jnp.where(count >= window, 1 / window, 0)
        slow = jax.tree.map(lambda x: full * jnp.sum(x, axis=0), recent)
        return amplified(updates, slow), AmplifySlowWindowState(count, recent)

    return optax.GradientTransformation(init_window, slide)
