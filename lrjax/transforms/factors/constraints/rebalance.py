from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._tree import check_has_nodes, check_params, check_whole, map_nodes
from ....lowrank import LowRank, refactor
from ..._checks import check_extra


class RebalanceState(NamedTuple):
    """Whether it has been done; kept only if it is done once."""

    done: Bool[Array, ""]


@checks_trees
def rebalance(
    mode: Literal["balanced", "nearest", "left", "right"] = "balanced",
    *,
    scale: ArrayLike = 1.0,
    once_below: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Choose the factors anew after the step, without moving their product.

    The update ``U`` is replaced by ``refactor(X + U, mode, scale) − X``. By default the
    factors become balanced, ``leftᵀleft = rightᵀright`` diagonal, after every step.
    Place it last in the chain, after the learning rate. Costs two QR decompositions and
    an ``r × r`` SVD a node. Moments of the factors keep their meaning best with
    ``"nearest"``, which turns balanced factors back towards ``X + U``. Factors whose
    product is zero, as those of LoRA at a first step of length zero, stay what they are:
    both zero, they would have no gradient ever after.

    ``rebalance("left", scale=β, once_below=…)`` is the one-step remedy for plain gradient
    descent on factors that are wider than the rank: done once, when the loss has become
    small, it turns the sublinear end into a linear one, whose rate does not depend on
    the size of the start. β is about the root of the smallest singular value of the
    truth; the rate is about ``1 − ηβ²``.

    Args:
        mode: see :func:`lrjax.refactor`.
        scale: see :func:`lrjax.refactor`.
        once_below: do it in the first step with ``value <= once_below`` and never again.

    Returns:
        An optax transform; ``update`` needs ``params``, and ``value`` for ``once_below``.

    Raises:
        ValueError: in ``init``, if the tree holds no LowRank node, or one with a frozen
            factor; in ``update``, if
            ``params`` or ``value`` is missing.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.array([[8.0], [0.0]]), jnp.array([[0.5]]))
        >>> still = lrjax.LowRank(jnp.zeros((2, 1)), jnp.zeros((1, 1)))
        >>> tx = lrjax.rebalance()
        >>> step, _ = tx.update(still, tx.init(x), x)
        >>> print(optax.apply_updates(x, step).right.round(4))
        [[2.]]

    Reference:
        The one-step remedy: N. Xiong, L. Ding, S. Du, "How over-parameterization slows
        down gradient descent in matrix sensing" (2024), arXiv 2310.01769.
    """

    def init(params):
        check_has_nodes("rebalance", params)
        check_whole("rebalance", params)
        if once_below is None:
            return optax.EmptyState()
        return RebalanceState(jnp.zeros([], bool))

    def move(u: LowRank, x: LowRank) -> LowRank:
        target = refactor(LowRank(x.left + u.left, x.right + u.right), mode, scale=scale)
        # Both factors zero would be the end: no gradient reaches them ever after.
        both = (target.left, target.right)
        there = sum(jnp.sum(jnp.abs(y), axis=(-2, -1), keepdims=True) for y in both) > 0
        pick = lambda new, old, update: jnp.where(there, new - old, update)
        return LowRank(
            pick(target.left, x.left, u.left), pick(target.right, x.right, u.right)
        )

    def update(updates, state, params=None, *, value: Any = None, **extra):
        del extra
        check_params("rebalance", params)
        if once_below is None:
            return map_nodes(move, updates, params), state
        check_extra("rebalance(once_below=…)", value=value)
        now = ~state.done & (value <= once_below)

        def move_now(u: LowRank, x: LowRank) -> LowRank:
            new = move(u, x)
            return LowRank(
                jnp.where(now, new.left, u.left), jnp.where(now, new.right, u.right)
            )

        updates = lax.cond(
            any_member(now),
            lambda u: map_nodes(move_now, u, params),
            lambda u: u,
            updates,
        )
        return updates, RebalanceState(state.done | now)

    return optax.GradientTransformationExtraArgs(init, update)
