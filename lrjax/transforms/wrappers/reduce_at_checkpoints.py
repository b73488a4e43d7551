import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real
from ...linalg import increment


class ReduceAtCheckpointsState(NamedTuple):
    """The state of :func:`reduce_at_checkpoints`.

    Attributes:
        count: the number of scores.
        rate: what the updates are multiplied by.
        last: the last score.
        best: the largest one.
        gains: how many since the last checkpoint were above the one before.
        best_then: the largest one at the last checkpoint.
        rested: whether the rate stayed as it was there.
        best_params: the parameters of the best score.
    """

    count: Int[Array, ""]
    rate: Float[Array, ""]
    last: Float[Array, ""]
    best: Float[Array, ""]
    gains: Int[Array, ""]
    best_then: Float[Array, ""]
    rested: Bool[Array, ""]
    best_params: PyTree


@checks_trees
def reduce_at_checkpoints(
    checkpoints: Sequence[int] = (0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50),
    *,
    factor: ArrayLike = 0.5,
    progress: ArrayLike = 0.75,
) -> optax.GradientTransformationExtraArgs:
    """A learning rate that falls, and goes back to the best, where a score tells it to.

    ``update(…, score=…)`` is given the score of ``params``, a robust accuracy on validation
    data say, once an epoch; in all other steps none, or NaN. The scores are counted from
    zero, ``s₀, s₁, …``. At the checkpoint ``w_j`` the updates are multiplied by ``factor``
    once more from now on, and the step leads to the parameters of the best score, if

    - fewer than ``progress · (w_j − w_{j−1})`` scores since the last checkpoint were above
      the one before them, or
    - the rate stayed as it was at the last checkpoint, and no score since was the best.

    Place it last in the chain, after the learning rate. State: the best parameters.

    Args:
        checkpoints: numbers of scores, from zero on and growing.
        factor: what a reduction multiplies the rate by.
        progress: which share of the scores has to be better than the one before.

    Returns:
        An optax transform; ``update`` needs ``params`` where it is given a ``score``.

    Raises:
        ValueError: for checkpoints that do not begin at zero and grow; in ``update``, for a
            score without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.transforms.reduce_at_checkpoints((0, 2))
        >>> x = jnp.array([3.0])
        >>> state = tx.init(x)
        >>> for score in (0.5, 0.7, 0.6):  # one of two is better than the one before
        ...     step, state = tx.update(jnp.array([-1.0]), state, x, score=score)
        ...     x = x + step
        ...     print(x, state.rate)
        [2.] 1.0
        [1.] 1.0
        [2.] 0.5

    Reference:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble
        of diverse parameter-free attacks" (2020), arXiv 2003.01690, for the steps of an
        attack; for training: X. Xu, J. Zhang, M. Kankanhalli, "AutoLoRa: a parameter-free
        automated robust fine-tuning framework" (2023), arXiv 2310.01818, whose code takes
        the second condition without its first half.
    """
    places = tuple(checkpoints)
    if places[:1] != (0,) or any(a >= b for a, b in itertools.pairwise(places)):
        raise ValueError(
            f"reduce_at_checkpoints needs checkpoints (0, …) that grow, got {checkpoints}."
        )

    def init(params):
        check_real("reduce_at_checkpoints", params)
        low = jnp.asarray(jnp.finfo(jnp.float32).min)  # below every score, and finite
        zero = jnp.zeros((), jnp.int32)
        return ReduceAtCheckpointsState(
            count=zero,
            rate=jnp.ones((), jnp.float32),
            last=low,
            best=low,
            gains=zero,
            best_then=low,
            rested=jnp.ones((), bool),
            best_params=jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates, state, params=None, *, score: Any = None, **extra):
        del extra
        if score is None:
            slower = lambda u: (state.rate * u).astype(u.dtype)
            return jax.tree.map(slower, updates), state
        if params is None:
            raise ValueError(
                "reduce_at_checkpoints needs the parameters that a score belongs to: call "
                "tx.update(updates, state, params, score=…)."
            )
        state, reduces = judged(state, score, params)

        def step(u: Array, best: Array, x: Array) -> Array:
            return jnp.where(reduces, best - x, (state.rate * u).astype(u.dtype))

        return jax.tree.map(step, updates, state.best_params, params), state

    def judged(old, score, params) -> tuple[ReduceAtCheckpointsState, Bool[Array, ""]]:
        """The state with one more score, if it is one, and whether the rate falls."""
        score = jnp.asarray(score, jnp.float32)
        known, better = jnp.isfinite(score), score > old.best
        best = jnp.where(better, score, old.best)
        gains = old.gains + ((old.count > 0) & (score > old.last))
        due, steps = at(old.count)
        stands = old.rested & (best == old.best_then)
        reduces = known & due & (steps > 0) & ((gains < progress * steps) | stands)
        new = ReduceAtCheckpointsState(
            count=increment(old.count),
            rate=jnp.where(reduces, old.rate * factor, old.rate).astype(jnp.float32),
            last=score,
            best=best,
            gains=jnp.where(due, 0, gains),
            best_then=jnp.where(due, best, old.best_then),
            rested=jnp.where(due, ~reduces, old.rested),
            best_params=jax.tree.map(
                lambda x, b: jnp.where(better, x, b), params, old.best_params
            ),
        )
        return jax.tree.map(lambda n, o: jnp.where(known, n, o), new, old), reduces

    def at(count: Int[Array, ""]) -> tuple[Bool[Array, ""], Int[Array, ""]]:
        """Whether this is a checkpoint, and how many scores after the last one."""
        steps = jnp.diff(jnp.asarray(places), prepend=0)
        here = jnp.asarray(places) == count
        return jnp.any(here), jnp.sum(here * steps)

    return optax.GradientTransformationExtraArgs(init, update)
