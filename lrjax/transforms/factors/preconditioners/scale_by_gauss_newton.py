import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, like, map_nodes, sides
from ....linalg import cross, eigh, gram, identity_like, increment, nonzero, times
from ....lowrank import LowRank
from ..._checks import check_extra, check_non_negative
from ._precondition import precondition
from .scale_by_gram import ScaleByGramState


@checks_trees
def scale_by_gauss_newton(
    damping: ArrayLike | optax.Schedule = 0.0,
    *,
    relative: bool = True,
    loss_power: ArrayLike | None = None,
    f_min: ArrayLike = 0.0,
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Precondition the gradient of both factors by the whole Gauss-Newton matrix.

    With ``J`` the derivative of ``(left, right) ↦ left @ right.T`` the direction solves
    ``(JᵀJ + λI) P = G``, that is::

        P_l (RᵀR + λI) + L P_rᵀ R = G_l
        P_r (LᵀL + λI) + R P_lᵀ L = G_r

    :func:`scale_by_gram` drops the coupling terms. The system has
    ``(m + n) r`` unknowns but a closed solution: ``V = P_lᵀ L`` solves the Sylvester
    equation ``RᵀR V + V LᵀL + λV = H`` with ``H = G_lᵀ L = Rᵀ G_r``, elementwise in the
    eigenvectors of the two Gram matrices, and then::

        P_l = (G_l − L Vᵀ)(RᵀR + λI)⁻¹        P_r = (G_r − R V)(LᵀL + λI)⁻¹

    Two ``r × r`` eigendecompositions and ``O((m + n) r²)`` work; no iteration. Leaves
    that are no LowRank nodes pass unchanged. Of a pair with a frozen right factor the
    equation of the left one is left, with ``P_r = 0``, and its Gram matrix alone counts.

    Args:
        damping: ``λ``, or its ratio to the mean of the diagonals of the two Gram matrices,
            see ``relative``. A number, or an optax schedule of the step. Never less than
            their rounding error, so 0, Gauss-Newton, is safe.
        relative: if True, ``damping`` multiplies that mean; if False it is absolute.
        loss_power: multiplies λ by ``max(value − f_min, 0)**loss_power``, as in
            :func:`scale_by_gram`.
        f_min: the smallest value of the loss, for ``loss_power``. ``update(..., f_min=…)``
            overrides it for one step, for rules that estimate it on the way.
        normalize: divide by ``sqrt(⟨G, P⟩)``, so that the length of the step in the
            metric of the preconditioner is the learning rate.

    Returns:
        An optax transform; ``update`` needs ``params``, ``value`` for ``loss_power``,
        and ``frozen`` where a factor is frozen.

    Raises:
        ValueError: at construction, for negative damping; in ``init``, if the tree holds
            no LowRank node; in ``update``, if ``params`` or ``value`` is missing or a node
            was torn apart by a leaf-wise mask.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0]]))
        >>> grad = lrjax.LowRank(jnp.array([[4.0], [8.0]]), jnp.array([[22.0]]))
        >>> tx = lrjax.scale_by_gauss_newton()
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left[0].round(3), step.right.shape)
        [-0.138] (1, 1)

    Reference:
        M. Díaz, L. Jiang, A. G. Labassi, "Preconditioned subgradient method for composite
        optimization: overparameterization and fast convergence" (2025), arXiv 2509.11486,
        who solve the system by conjugate gradients. Special case: without damping the
        product moves as under :func:`scale_by_tangent`.
    """
    check_non_negative("scale_by_gauss_newton", "damping", damping)
    counts = callable(damping)

    def init(params):
        check_has_nodes("scale_by_gauss_newton", params)
        return ScaleByGramState(jnp.zeros([], jnp.int32)) if counts else optax.EmptyState()

    smallest = f_min

    def update(
        updates,
        state,
        params=None,
        *,
        value: Any = None,
        f_min: Any = None,
        frozen=None,
        **extra,
    ):
        del extra
        check_params("scale_by_gauss_newton", params)
        strength = damping(state.count) if callable(damping) else damping
        if loss_power is not None:
            check_extra("scale_by_gauss_newton(loss_power=…)", value=value)
            gap = value - (smallest if f_min is None else f_min)
            strength = strength * jnp.maximum(gap, 0) ** loss_power

        def solve(g: LowRank, x: LowRank) -> LowRank:
            if len(sides(g, x)) == 2:
                p = _solve(g, x, strength, relative)
            else:
                p = jax.tree.leaves(precondition(g, x, strength, relative))
            return like(g, *(_unit(g, p) if normalize else p))

        updates = map_nodes(solve, updates, params, frozen=frozen)
        if counts:
            state = ScaleByGramState(increment(state.count))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _solve(
    g: LowRank, x: LowRank, damping: ArrayLike, relative: bool
) -> tuple[Array, Array]:
    a, b = gram(x.left), gram(x.right)
    trace = jnp.sum((a + b) * identity_like(a), axis=(-2, -1))
    damping = jnp.asarray(damping, a.dtype)
    if relative:
        damping = damping * trace / (2 * x.rank)
    damping = jnp.maximum(damping, 8 * jnp.finfo(a.dtype).eps * trace)
    # Zero factors: an infinite damping, short of overflow.
    damping = jnp.where(trace + damping > 0, damping, jnp.finfo(a.dtype).max / 4)
    damping = damping[..., None]
    (a, u), (b, w) = _eigen(a), _eigen(b)
    left, right = (f.astype(a.dtype) for f in (x.left, x.right))
    g_left, g_right = (f.astype(a.dtype) for f in (g.left, g.right))
    # In the eigenvectors of both Gram matrices all of them are diagonal.
    left, g_right = times(left, u), times(g_right, u)
    right, g_left = times(right, w), times(g_left, w)
    # The two agree for a loss of the product; their mean treats both factors alike.
    h = 0.5 * (cross(g_left, left) + cross(right, g_right))
    v = h / (b[..., :, None] + a[..., None, :] + damping[..., None])
    p_left = (g_left - times(left, v.mT)) / (b + damping)[..., None, :]
    p_right = (g_right - times(right, v)) / (a + damping)[..., None, :]
    return times(p_left, w.mT), times(p_right, u.mT)


def _eigen(g: Array) -> tuple[Array, Array]:
    values, vectors = eigh(g)
    return jnp.maximum(values, 0), vectors


def _unit(g: LowRank, p: Sequence[Array]) -> list[Array]:
    """``P / sqrt(⟨G, P⟩)`` for each member of a stack."""

    def product(a, b):
        return jnp.sum(a.astype(b.dtype) * b, axis=(-2, -1), keepdims=True)

    products = map(product, jax.tree.leaves(g), p)
    size = jnp.sqrt(nonzero(functools.reduce(jnp.add, products)))
    return [x / size for x in p]
