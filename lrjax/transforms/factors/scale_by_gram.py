import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int

from ..._arguments import checks_trees
from ..._tree import check_has_nodes, check_params, like, map_nodes, sides
from ...linalg import increment, inverse_grams, inverse_root_grams, nonzero, times
from ...lowrank import LowRank
from .._checks import check_extra, check_non_negative


Phi = Callable[[LowRank], LowRank]


class ScaleByGramState(NamedTuple):
    """The number of updates made; kept only if the update rule depends on it."""

    count: Int[Array, ""]


@checks_trees
def scale_by_gram(
    damping: ArrayLike | optax.Schedule = 0.0,
    *,
    relative: bool = True,
    order: Literal["jacobi", "alternating"] = "jacobi",
    phi: Phi | None = None,
    loss_power: ArrayLike | None = None,
    f_min: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Precondition the gradient of each factor by the Gram matrix of the other one.

    For a node ``X = left @ right.T`` with gradients ``G_l (m, r)`` and ``G_r (n, r)``::

        P_l = G_l (rightᵀright + λI)⁻¹        P_r = G_r (leftᵀleft + λI)⁻¹

    With ``λ = 0`` the step ``X ← X − η(P_l rightᵀ + left P_rᵀ)`` does not depend on how X
    is split into factors, and the local rate of convergence does not depend on the
    condition number of X. It is block-Jacobi Gauss-Newton: no state but a step count,
    ``O((m + n) r²)`` work. Leaves that are no LowRank nodes pass unchanged. Place it
    before momentum or Adam.

    Of a pair with a frozen factor, as :func:`lrjax.partition` leaves it (LoRA-FA:
    ``LowRank(left, None)``, the right one in the other half), the factor that is trained
    moves in every step. The frozen one is read from ``tx.update(…, frozen=frozen)``; it
    has no state and no gradient, and the Gram matrix of the other one is not formed.

    Args:
        damping: ``λ``, or its ratio to the mean squared column norm ``tr(Gram)/r`` of the
            other factor, see ``relative``. A number, or an optax schedule of the step.
            Never less than the rounding error of the Gram matrix, so 0 is safe.
        relative: if True, ``damping`` multiplies ``tr(Gram)/r``; if False it is absolute.
        order: ``"jacobi"`` updates both factors from the old pair. ``"alternating"``
            updates ``left`` in the steps 0, 2, …, ``right`` in the steps 1, 3, …, each
            with a gradient taken after the other's update (Gauss-Seidel), and gives
            zeros to the other factor. With a squared loss, an identity operator and
            learning rate 1 that is alternating least squares.
        phi: applied to the whitened gradient ``(G_l K_r, G_r K_l)``, where
            ``K Kᵀ = (Gram + λI)⁻¹``, before the second half ``Kᵀ`` of the whitening. It
            should commute with a rotation of the columns of either factor, as
            :func:`unit_norm` or a polar factor do. A factor that is frozen is ``None``.
        loss_power: multiplies λ by ``max(value − f_min, 0)**loss_power``, with the loss
            from the extra argument ``value``: 1 makes the damping proportional to the
            optimality gap, 0.5 to its root. ``None``: the loss is not read.
        f_min: the smallest value of the loss, for ``loss_power``. ``update(..., f_min=…)``
            overrides it for one step, for rules that estimate it on the way.

    Returns:
        An optax transform; ``update`` needs ``params``, ``value`` for ``loss_power``,
        and ``frozen`` where a factor is frozen.

    Raises:
        ValueError: at construction, for negative damping or an unknown order; in
            ``init``, if the tree holds no LowRank node; in ``update``, if ``params`` or
            ``value`` is missing or a node was torn apart by a leaf-wise mask.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0]]))
        >>> grad = lrjax.LowRank(jnp.array([[4.0], [8.0]]), jnp.array([[50.0]]))
        >>> tx = lrjax.scale_by_gram()
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left.ravel().round(4), step.right.round(4))
        [1. 2.] [[2.]]

    Reference:
        T. Tong, C. Ma, Y. Chi, "Accelerating ill-conditioned low-rank matrix estimation
        via scaled gradient descent" (2021), arXiv 2005.08898; damped: X. Xu, Y. Shen,
        Y. Chi, C. Ma, "The power of preconditioning in overparameterized low-rank matrix
        sensing" (2023), arXiv 2302.01186; on LoRA factors: F. Zhang, M. Pilanci,
        "Riemannian preconditioned LoRA for fine-tuning foundation models" (2024), arXiv
        2402.02347; root-of-the-loss damping: J. Zhang, S. Fattahi, R. Zhang,
        "Preconditioned gradient descent for over-parameterized nonconvex matrix
        factorization" (2021), arXiv 2504.09708.
    """
    check_non_negative("scale_by_gram", "damping", damping)
    if order not in ("jacobi", "alternating"):
        raise ValueError(f"order must be 'jacobi' or 'alternating', got {order!r}.")
    counts = callable(damping) or order == "alternating"

    def init(params):
        check_has_nodes("scale_by_gram", params)
        return ScaleByGramState(jnp.zeros([], jnp.int32)) if counts else optax.EmptyState()

    smallest = f_min

    def update(
        updates,
        state,
        params=None,
        *,
        value: Any = None,
        f_min: Any = None,
        frozen: Any = None,
        **extra,
    ):
        del extra
        check_params("scale_by_gram", params)
        strength = damping(state.count) if callable(damping) else damping
        if loss_power is not None:
            check_extra("scale_by_gram(loss_power=…)", value=value)
            gap = value - (smallest if f_min is None else f_min)
            strength = strength * jnp.maximum(gap, 0) ** loss_power

        def step(g: LowRank, x: LowRank) -> LowRank:
            moves = precondition(g, x, strength, relative, phi)
            if order == "alternating" and len(moves) == 2:
                turn = state.count % 2 == 0
                moves = [jnp.where(turn, moves[0], 0), jnp.where(turn, 0, moves[1])]
            return like(g, *moves)

        updates = map_nodes(step, updates, params, frozen=frozen)
        if counts:
            state = ScaleByGramState(increment(state.count))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def precondition(
    g: LowRank, x: LowRank, damping: ArrayLike, relative: bool, phi: Phi | None = None
) -> list[Array]:
    """The directions of the factors that move, in float32 or wider."""
    gradients, _, partners = zip(*sides(g, x), strict=True)
    if phi is None:
        inverses = inverse_grams(*partners, damping=damping, relative=relative)
        return list(map(_apply, gradients, inverses))
    roots = inverse_root_grams(*partners, damping=damping, relative=relative)
    whitened = phi(_in_place_of(g, map(_apply, gradients, roots)))
    return [_apply(w, k.mT) for w, k in zip(jax.tree.leaves(whitened), roots, strict=True)]


def _apply(tall: Array, small: Array) -> Array:
    return times(tall.astype(small.dtype), small)


def _in_place_of(g: LowRank, factors: Iterable[Array]) -> LowRank:
    """A node with the factors that ``g`` has, in their own dtype."""
    return jax.tree.structure(g).unflatten(factors)


def unit_norm(x: LowRank) -> LowRank:
    """Scale a pair of factors to ``‖left‖² + ‖right‖² = 1``; zero stays zero.

    As the ``phi`` of :func:`scale_by_gram` it normalizes the step in the metric of the
    preconditioner, ``⟨G, P⟩ = 1``: the learning rate is then the length of the step,
    about the Frobenius distance that ``X`` moves.

    Args:
        x: factors ``(*batch, m, r)`` and ``(*batch, n, r)``, scaled for each member of
            the batch.

    Returns:
        The scaled factors.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.unit_norm(lrjax.LowRank(jnp.array([[3.0]]), jnp.array([[4.0]]))).left
        Array([[0.6]], dtype=float32)
    """
    over = lambda reduce, x: reduce(x, axis=(-2, -1), keepdims=True)
    largest = [over(jnp.max, jnp.abs(factor)) for factor in jax.tree.leaves(x)]
    scale = nonzero(functools.reduce(jnp.maximum, largest))
    x = jax.tree.map(lambda factor: factor / scale, x)
    squares = [over(jnp.sum, factor**2) for factor in jax.tree.leaves(x)]
    size = jnp.sqrt(nonzero(functools.reduce(jnp.add, squares)))
    return jax.tree.map(lambda factor: factor / size, x)
