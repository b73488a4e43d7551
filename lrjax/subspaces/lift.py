from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from .bases.basis import Dense, Rows, squares_along


class Projected(NamedTuple):
    """One step of one leaf, as a lift sees it.

    Attributes:
        gradient: ``a (*b, m, n)``.
        projected: ``R``, either ``Pᵀ a (*b, r, n)`` or ``a P (*b, m, r)``.
        step: what the inner transform made of ``R``, ``N``, of the same shape.
        frame: the basis, with ``down`` and ``up``.
        key: a key of this leaf and step.
        count: the number of steps before this one.
    """

    gradient: Float[Array, "*b m n"]
    projected: Float[Array, "*b m2 n2"]
    step: Float[Array, "*b m2 n2"]
    frame: Dense | Rows
    key: PRNGKeyArray
    count: Int[Array, ""]


class Lift(NamedTuple):
    """How the inner step and what the subspace left out become the update.

    Attributes:
        apply: ``(Projected, state) -> (update (*b, m, n), state)``.
        init: ``(shape (*b, m, n), dtype) -> state``, a pytree of arrays.
        needs_orthonormal: whether it takes ``a − P Pᵀ a`` for the part left out.
    """

    apply: Callable[[Projected, Any], tuple[Array, Any]]
    init: Callable[[tuple[int, ...], Any], Any] = lambda shape, dtype: ()
    needs_orthonormal: bool = False


def project(scale: ArrayLike = 1.0) -> Lift:
    """``U = scale · P N``: the update stays in the subspace.

    Args:
        scale: factor.

    Returns:
        The lift.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), lift=sub.project(0.25)
        ... )
    """
    return Lift(lambda x, state: (x.frame.up(x.step) * scale, state))


def residual(weight: ArrayLike = 1.0, scale: ArrayLike = 1.0) -> Lift:
    """``U = scale · P N + weight · (a − P R)``: plain descent outside the subspace.

    Args:
        weight: factor of the residual.
        scale: factor of the inner step.

    Returns:
        The lift.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), lift=sub.residual(0.1)
        ... )

    Reference:
        T. Nguyen, H. L. Nguyen, "Subset-Norm and Subspace-Momentum" (2024), arXiv
        2411.07120.
    """

    def apply(x, state):
        inside = x.frame.up(scale * x.step - weight * x.projected)
        return inside + weight * x.gradient, state

    return Lift(apply, needs_orthonormal=True)


def blend(b1: ArrayLike = 0.9) -> Lift:
    """``U = P N + (1−b1)(a − P R)``: the present gradient enters whole.

    For an inner ``optax.ema(b1, debias=False)`` this is ``b1 · P m_old + (1−b1) · a``:
    the past comes from the compressed momentum, the present uncompressed. An identity,
    so ``P`` need not be orthonormal.

    Args:
        b1: decay of the inner average.

    Returns:
        The lift.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.ema(0.9, debias=False), sub.gaussian(4), lift=sub.blend(0.9)
        ... )

    Reference:
        Y. Hao, Y. Cao, L. Mou, "Flora" (2024), arXiv 2402.03293.
    """
    return residual(1 - b1)._replace(needs_orthonormal=False)


def sign_residual(weight: ArrayLike = 1.0, scale: ArrayLike = 1.0) -> Lift:
    """``U = scale · P N + weight · sign(a − P R)``: sign descent outside the subspace.

    Args:
        weight: factor of the residual, the ratio of the two learning rates.
        scale: factor of the inner step.

    Returns:
        The lift.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), lift=sub.sign_residual()
        ... )

    Reference:
        P. Zmushko et al., "FRUGAL" (2024), arXiv 2411.07837.
    """

    def apply(x, state):
        inside = scale * x.frame.up(x.step)
        return inside + weight * jnp.sign(x.gradient - x.frame.up(x.projected)), state

    return Lift(apply, needs_orthonormal=True)


def _scaling(x: Projected, over: str) -> Float[Array, "..."]:
    """``φ = ‖N‖/‖R‖``, one for each vector along the projected axis, or each matrix.

    A vector whose projection is of rounding size, because it is orthogonal to the basis,
    has no ``φ`` of its own: it takes that of all others together, zero if there are none.
    """
    axis = x.frame.axis
    top, bottom = (squares_along(y, axis) for y in (x.step, x.projected))
    rounding = 4 * jnp.finfo(bottom.dtype).eps * x.gradient.shape[axis] ** 0.5
    known = bottom > rounding**2 * squares_along(x.gradient, axis)
    top, bottom = jnp.where(known, top, 0), jnp.where(known, bottom, 0)
    whole = _root_ratio(*(jnp.sum(y, axis=(-2, -1), keepdims=True) for y in (top, bottom)))
    return whole if over == "tensor" else jnp.where(known, _root_ratio(top, bottom), whole)


def _root_ratio(top: Array, bottom: Array) -> Array:
    return jnp.where(bottom > 0, jnp.sqrt(top / jnp.where(bottom > 0, bottom, 1)), 0)


def limit_growth(
    norm: Float[Array, "*b"], previous: Float[Array, "*b"], growth: ArrayLike
) -> Float[Array, "*b"]:
    """The factor that keeps ``norm`` at or below ``growth · previous``.

    One where ``previous`` is zero, which stands for "nothing known yet".
    """
    limit = growth * previous
    return jnp.where((previous > 0) & (norm > limit), limit / norm, 1)


def fira(
    scale: ArrayLike = 1.0,
    *,
    growth: ArrayLike | None = 1.01,
    over: Literal["channel", "tensor"] = "channel",
) -> Lift:
    """The residual, scaled as the inner transform scaled the subspace.

    ``U = scale · P N + S`` with ``S = (a − P R) diag(φ)``, ``φ_j = ‖N_j‖/‖R_j‖`` for each
    vector ``j`` along the projected axis, the norm of ``S`` limited to ``growth`` times
    that of the last step. A vector orthogonal to the basis has ``φ_j = 0/0`` and takes
    the ``φ`` of all others together.

    Args:
        scale: factor of the inner step alone.
        growth: the limit; None for no limit.
        over: one ``φ`` for each column, or for the whole matrix.

    Returns:
        The lift. Its state is the last norm of ``S``, one number a matrix.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), lift=sub.fira()
        ... )

    Reference:
        X. Chen et al., "Fira" (2024), arXiv 2410.01623.
    """

    def apply(x, state):
        phi = _scaling(x, over)
        if growth is not None:
            # ‖a_j − P R_j‖² = ‖a_j‖² − ‖R_j‖² by orthonormality: no product with P.
            axis = x.frame.axis
            left_out = squares_along(x.gradient, axis) - squares_along(x.projected, axis)
            squares = phi**2 * jnp.maximum(left_out, 0)
            norm = jnp.sqrt(jnp.sum(squares, axis=(-2, -1)))
            factor = limit_growth(norm, state, growth)
            state, phi = norm * factor, phi * factor[..., None, None]
        inside = x.frame.up(scale * x.step - phi * x.projected)
        return inside + phi * x.gradient, state

    return Lift(apply, _init_norm(growth), needs_orthonormal=True)


def _init_norm(growth: ArrayLike | None) -> Callable[[tuple[int, ...], Any], Any]:
    if growth is None:
        return lambda shape, dtype: ()
    return lambda shape, dtype: jnp.zeros(shape[:-2], dtype)


def apollo(
    scale: ArrayLike = 1.0,
    *,
    growth: ArrayLike | None = 1.01,
    over: Literal["channel", "tensor"] = "channel",
) -> Lift:
    """The raw gradient, scaled as the inner transform scaled its projection.

    ``U = scale · a diag(φ)``, ``φ_j = ‖N_j‖/‖R_j‖``, its norm limited to ``growth`` times
    that of the last step. The direction is the gradient's own; the subspace only
    measures step sizes, so it may be random and of very low rank.

    Args:
        scale: factor.
        growth: the limit; None for no limit.
        over: one ``φ`` for each column, or for the whole matrix.

    Returns:
        The lift. Its state is the last norm, one number a matrix.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.gaussian(4), lift=sub.apollo()
        ... )

    Reference:
        H. Zhu et al., "APOLLO" (2024), arXiv 2412.05270.
    """

    def apply(x, state):
        update = x.gradient * _scaling(x, over)
        if growth is not None:
            norm = jnp.sqrt(jnp.sum(update**2, axis=(-2, -1)))
            factor = limit_growth(norm, state, growth)
            state, update = norm * factor, update * factor[..., None, None]
        return scale * update, state

    return Lift(apply, _init_norm(growth))


def sampled_residual(
    probability: ArrayLike = 0.5, transform: Callable[[Array], Array] = lambda x: x
) -> Lift:
    """By the toss of a coin the subspace or the rest of the space, unbiased.

    With probability ``q``: ``U = f(a − P R)/q``; else ``U = P N/(1−q)``.

    Args:
        probability: ``q`` in (0, 1).
        transform: ``f``, for example ``lrjax.linalg.polar``.

    Returns:
        The lift.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.trace(0.9), sub.svd(4), lift=sub.sampled_residual(0.2)
        ... )

    Reference:
        "Unbiased gradient low-rank projection" (2025), arXiv 2510.17802.
    """

    def apply(x, state):
        outside = transform(x.gradient - x.frame.up(x.projected)) / probability
        inside = x.frame.up(x.step) / (1 - probability)
        return jnp.where(jr.bernoulli(x.key, probability), outside, inside), state

    return Lift(apply, needs_orthonormal=True)


def outer(transform: Callable[[Array], Array], lift: Lift | None = None) -> Lift:
    """Apply a function to the lifted update, ``U = f(P N)``.

    A nonlinearity inside the subspace and the same one outside give different
    methods: Lion's sign, for example, belongs here in online subspace descent.

    Args:
        transform: ``f``, from ``(*b, m, n)`` to the same.
        lift: the lift before it; :func:`project` by default.

    Returns:
        The lift.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.ema(0.9), sub.svd(4), lift=sub.outer(jnp.sign)
        ... )
    """
    base = project() if lift is None else lift

    def apply(x, state):
        update, state = base.apply(x, state)
        return transform(update), state

    return base._replace(apply=apply)


class Feedback(NamedTuple):
    """Error feedback: what a step left out is added to the next gradient.

    Attributes:
        b1: decay of the inner first moment, an average as in Adam; 0 for none.
        dtype: of the full-size buffer; that of the working precision by default.
    """

    b1: ArrayLike = 0.9
    dtype: Any = None


def error_feedback(b1: ArrayLike = 0.9, dtype: Any = None) -> Feedback:
    """Keep what the subspace cannot hold, and add it to the next gradient.

    ``a = g + e``, ``e ← a − P R + b1/(1−b1) · (P_old m_old − P m)``: the part of the
    gradient outside the subspace, and the part of the momentum that the change of basis
    lost. Costs a buffer of the size of the leaf.

    Args:
        b1: decay of the inner first moment, an average as in Adam; 0 for none.
        dtype: of the buffer; that of the working precision by default.

    Returns:
        The feedback.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.power(4), feedback=sub.error_feedback()
        ... )

    Reference:
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam" (2024), arXiv
        2410.16103.
    """
    return Feedback(b1, dtype)
