from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..._batching import any_member
from ..._sharding import einsum, gathered, placed_like
from ...linalg import orthonormalize
from ..view import Rank, Side
from .basis import Basis, Dense, _dense_init, svd


def _down(p: Array, a: Array) -> Array:
    return einsum("...pr,...pq->...rq", p, a)


def _up(p: Array, x: Array) -> Array:
    return einsum("...pr,...rq->...pq", p, x)


def _normalized(a: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(a**2, axis=(-2, -1), keepdims=True))
    return a / jnp.where(norm > 0, norm, 1)


def geodesic(
    rank: Rank,
    step_size: ArrayLike = 10.0,
    *,
    start: Basis | None = None,
    side: Side = "short",
) -> Basis:
    """A step along a geodesic of the Grassmann manifold, by its leading direction.

    With ``R = Pᵀa`` and the residual ``Z = a − P R``, the descent direction of
    ``‖Z‖²`` is ``D = 2 Z Rᵀ ≈ σ u vᵀ``, and
    ``P ← P + (P v (cos ση − 1) + u sin ση) vᵀ``. ``P`` stays orthonormal. ``σ`` has the
    unit of a squared gradient, so the step size ``η`` has its inverse.

    Args:
        rank: see :class:`Basis`.
        step_size: ``η``.
        start: rule for the first basis; :func:`svd` by default.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.geodesic(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        S. Rajabi, N. Nonta, S. Rambhatla, "SubTrack++" (2025), arXiv 2502.01586.
    """

    def refresh(p, a, to):
        del to
        r = _down(p, a)
        outside = a - _up(p, r)
        # Once more: u must be orthogonal to P to rounding, whatever the residual's size.
        outside = outside - _up(p, _down(p, outside))
        direction = 2 * einsum("...pq,...rq->...pr", outside, r)
        squares = einsum("...pr,...ps->...rs", direction, direction)
        values, vectors = jnp.linalg.eigh(squares)
        v = vectors[..., -1:]
        sigma = jnp.sqrt(jnp.maximum(values[..., -1:, None], 0))
        u = einsum("...pr,...rk->...pk", direction, v)
        size = jnp.sqrt(jnp.sum(u**2, axis=-2, keepdims=True))
        u = u / jnp.where(size > 0, size, 1)
        angle = jnp.where(size > 0, sigma * step_size, 0)
        along = einsum("...pr,...rk->...pk", p, v)
        turned = along * (jnp.cos(angle) - 1) + u * jnp.sin(angle)
        return p + einsum("...pk,...rk->...pr", turned, v)

    first = svd(rank, side=side) if start is None else start
    return Basis(rank, side, refresh, start=first.refresh)


class OjaState(NamedTuple):
    """The state of :func:`oja`: the basis and the state of its optimizer."""

    matrix: Float[Array, "*b p r"]
    optimizer: Any


def _batched(f: Any, ndim: int) -> Any:
    for _ in range(ndim):
        f = jax.vmap(f)
    return f


def oja(
    rank: Rank,
    optimizer: optax.GradientTransformation | None = None,
    *,
    penalty: ArrayLike = 0.0,
    start: Basis | None = None,
    side: Side = "short",
) -> Basis:
    """A basis trained by gradient descent on its own reconstruction error.

    ``L(P) = ‖P Pᵀ ã − ã‖² + λ ‖PᵀP − I‖²`` with ``ã = a/‖a‖``; one optimizer step a
    refresh. With plain descent from an orthonormal ``P`` that is Oja's rule,
    ``P + 2η (I − PPᵀ) ããᵀ P``. ``P`` is kept near, not at, orthonormality.

    Args:
        rank: see :class:`Basis`.
        optimizer: an optax optimizer for ``P``; ``optax.sgd(0.5)`` by default.
        penalty: ``λ``.
        start: rule for the first basis; :func:`svd` by default.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.oja(4, optax.adam(1e-3))
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        K. Liang, B. Liu, L. Chen, Q. Liu, "Memory-efficient LLM training with online
        subspace descent" (2024), arXiv 2408.12857.
    """
    inner = optax.sgd(0.5) if optimizer is None else optimizer
    first = svd(rank, side=side) if start is None else start

    def init(shape, rank, dtype, key):
        matrix = _dense_init(shape, rank, dtype, key)
        return OjaState(matrix, _batched(inner.init, matrix.ndim - 2)(matrix))

    def refresh(state, a, to):
        del to
        p, a = state.matrix, _normalized(a)
        xp = einsum("...pq,...rq->...pr", a, _down(p, a))
        gram = einsum("...pr,...ps->...rs", p, p)
        eye = jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), gram.shape)
        inside = einsum("...pr,...ps->...rs", p, xp)
        gradient = (
            -4 * xp
            + 2 * einsum("...pr,...rs->...ps", xp, gram)
            + 2 * einsum("...pr,...rs->...ps", p, inside)
            + 4 * penalty * einsum("...pr,...rs->...ps", p, gram - eye)
        )
        update = _batched(inner.update, p.ndim - 2)
        step, optimizer_state = update(gradient, state.optimizer, p)
        return OjaState(p + step, optimizer_state)

    def begin(state, a, to):
        return state._replace(matrix=first.refresh(state.matrix, a, to))

    return Basis(
        rank,
        side,
        refresh,
        init,
        lambda state, *_: Dense(state.matrix),
        begin,
        orthonormal=False,
    )


def coap(
    rank: Rank,
    step_size: ArrayLike = 0.1,
    *,
    period: int = 32,
    recalibrate: int = 5,
    side: Side = "short",
) -> Basis:
    """A basis that follows both the gradient and the momentum.

    A refresh is one descent step, clipped to norm 1, on ``mean((P Pᵀ a − a)²) · (1 −
    mean_j cos((P m)_j, a_j))``, ``m`` the inner first moment. Every ``recalibrate``
    refreshes instead: ``Q = orth(aᵀP)``, then the left singular vectors of ``a Q``.

    Args:
        rank: see :class:`Basis`.
        step_size: of the descent.
        period: the period of the schedule that this basis is used with.
        recalibrate: how many refreshes there are to one recalibration.
        side: see :class:`Basis`.

    Returns:
        The basis rule. It is orthonormal only right after a recalibration.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.coap(4), schedule=sub.every(32)
        ... )

    Reference:
        J. Xiao, S. Sang, T. Zhi et al., "COAP" (2024), arXiv 2412.00071.
    """

    def sketch(p, a, to):
        del to
        q = orthonormalize(einsum("...pq,...pr->...qr", a, p))
        image = gathered(einsum("...pq,...qr->...pr", a, q))
        return placed_like(jnp.linalg.svd(image, full_matrices=False)[0], p)

    def objective(p, a, momentum):
        error = jnp.mean((_up(p, _down(p, a)) - a) ** 2, axis=(-2, -1))
        lifted = _up(p, momentum)
        squares = jnp.sum(lifted**2, axis=-2) * jnp.sum(a**2, axis=-2)
        product = jnp.sum(lifted * a, axis=-2)
        cosine = product * lax.rsqrt(jnp.where(squares > 0, squares, 1))
        return jnp.sum(error * (1 - jnp.mean(cosine, axis=-1)))

    def descend(p, a, to):
        none = jnp.zeros((*a.shape[:-2], p.shape[-1], a.shape[-1]), a.dtype)
        momentum = none if to.momentum is None else to.momentum
        gradient = jax.grad(objective)(p, a, lax.stop_gradient(momentum))
        norm = jnp.sqrt(jnp.sum(gradient**2, axis=(-2, -1), keepdims=True))
        return p - step_size * gradient / jnp.maximum(norm, 1)

    def refresh(p, a, to):
        again = any_member((to.count // period) % recalibrate == 0)
        return lax.cond(again, lambda: sketch(p, a, to), lambda: descend(p, a, to))

    return Basis(rank, side, refresh, start=sketch, orthonormal=False)


class EmaGramState(NamedTuple):
    """The state of :func:`ema_gram`: the averaged ``a aᵀ`` and the basis."""

    gram: Float[Array, "*b p p"]
    matrix: Float[Array, "*b p r"]


def ema_gram(rank: Rank, decay: ArrayLike = 0.95, *, side: Side = "short") -> Basis:
    """The dominant eigenvectors of a running average of ``a aᵀ``, by power steps.

    ``L ← β L + (1−β) a aᵀ`` on every step; a refresh is ``P ← orth(L P)``. At full rank
    the inner transform then runs in the eigenbasis of the averaged Gram matrix.

    Args:
        rank: see :class:`Basis`.
        decay: ``β``.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.ema_gram(4), schedule=sub.every(10, when="after")
        ... )

    Reference:
        N. Vyas et al., "SOAP" (2024), arXiv 2409.11321, its one-sided form.
    """

    def init(shape, rank, dtype, key):
        gram = jnp.zeros((*shape[:-2], shape[-2], shape[-2]), dtype)
        return EmaGramState(gram, _dense_init(shape, rank, dtype, key))

    def observe(state, a):
        gram = einsum("...pq,...sq->...ps", a, a)
        return state._replace(gram=decay * state.gram + (1 - decay) * gram)

    def refresh(state, a, to):
        del a, to
        image = einsum("...ps,...sr->...pr", state.gram, state.matrix)
        return state._replace(matrix=orthonormalize(image))

    def begin(state, a, to):
        del a
        vectors = jnp.linalg.eigh(gathered(state.gram))[1][..., ::-1][..., : to.rank]
        return state._replace(matrix=vectors)

    return Basis(
        rank,
        side,
        refresh,
        init,
        lambda state, *_: Dense(state.matrix),
        begin,
        observe,
    )
