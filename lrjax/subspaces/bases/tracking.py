import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._batching import any_member
from ..._matrices import Rank, Side
from ..._sharding import placed_like
from ...linalg import cross, eigh, identity_like, nonzero, orthonormalize, outer, svd, times
from .basis import Basis, DenseProjector, MatrixBasis, RefreshContext
from .decompositions import SVD, leading_eigenvectors
from .power import random_columns


class Geodesic(MatrixBasis):
    """A step along a geodesic of the Grassmann manifold, by its leading direction.

    With ``R = Pᵀa`` and the residual ``Z = a − P R``, the descent direction of
    ``‖Z‖²`` is ``D = 2 Z Rᵀ ≈ σ u vᵀ``, and
    ``P ← P + (P v (cos ση − 1) + u sin ση) vᵀ``. ``P`` stays orthonormal. ``σ`` has the
    unit of a squared gradient, so the step size ``η`` has its inverse; the angle ``ση`` is
    cut at the one that captures most of this gradient, whatever its size.

    Args:
        rank: see :class:`Basis`.
        step_size: ``η``.
        first: rule for the first basis; :class:`SVD` by default.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.Geodesic(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        S. Rajabi, N. Nonta, S. Rambhatla, "SubTrack++: gradient subspace tracking for
        scalable LLM training" (2025), arXiv 2502.01586.
    """

    rank: Rank
    step_size: ArrayLike = 10.0
    _: dataclasses.KW_ONLY
    first: MatrixBasis | None = None
    side: Side = "short"
    has_start: ClassVar[bool] = True

    def start(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """The basis of the rule for the first one."""
        return _first_rule(self).refresh(state, a, context)

    def refresh(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """The end of a geodesic step."""
        del context
        p = state
        r = cross(p, a)
        outside = a - times(p, r)
        # Once more: u must be orthogonal to P to rounding, whatever the residual's size.
        outside = outside - times(p, cross(p, outside))
        direction = 2 * outer(outside, r)
        values, vectors = eigh(cross(direction, direction))
        v = vectors[..., -1:]
        sigma = jnp.sqrt(jnp.maximum(values[..., -1:, None], 0))
        u = times(direction, v)
        size = jnp.sqrt(jnp.sum(u**2, axis=-2, keepdims=True))
        u = u / nonzero(size)
        # Along the geodesic the energy captured is A cos² + σ cos sin + B sin²: past the
        # angle where it is greatest, a longer step would only turn away again.
        inside = jnp.sum(cross(v, r) ** 2, axis=-1, keepdims=True)
        reached = jnp.sum(cross(u, outside) ** 2, axis=-1, keepdims=True)
        best = jnp.atan2(sigma, inside - reached) / 2
        angle = jnp.where(size > 0, jnp.minimum(sigma * self.step_size, best), 0)
        turned = times(p, v) * (jnp.cos(angle) - 1) + u * jnp.sin(angle)
        return p + outer(turned, v)


def _first_rule(basis: Any) -> MatrixBasis:
    return SVD(basis.rank, side=basis.side) if basis.first is None else basis.first


class _StatefulBasis(Basis):
    """A rule whose state is a NamedTuple with the basis as its field ``matrix``."""

    def projector(
        self, state: Any, key: PRNGKeyArray, size: int, rank: int, on_rows: bool
    ) -> DenseProjector:
        """The matrix of the state, applied from the left or the right."""
        del key, size, rank
        return DenseProjector(matrix=state.matrix, on_rows=on_rows)

    has_start: ClassVar[bool] = True

    @abc.abstractmethod
    def start(self, state: Any, a: Array, context: RefreshContext) -> Any:
        """The state that the first usable gradient makes."""


class OjaState(NamedTuple):
    """The state of :class:`Oja`: the basis and the state of its optimizer."""

    matrix: Float[Array, "*b p r"]
    optimizer: Any


def _batched(f: Any, ndim: int) -> Any:
    for _ in range(ndim):
        f = jax.vmap(f)
    return f


class Oja(_StatefulBasis):
    """A basis trained by gradient descent on its own reconstruction error.

    ``L(P) = ‖P Pᵀ ã − ã‖² + λ ‖PᵀP − I‖²`` with ``ã = a/‖a‖``; one optimizer step a
    refresh. With plain descent from an orthonormal ``P`` that is Oja's rule,
    ``P + 2η (I − PPᵀ) ããᵀ P``. ``P`` is kept near, not at, orthonormality.

    Args:
        rank: see :class:`Basis`.
        optimizer: an optax optimizer for ``P``; ``optax.sgd(0.5)`` by default.
        penalty: ``λ``.
        first: rule for the first basis; :class:`SVD` by default.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.Oja(4, optax.adam(1e-3))
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        K. Liang, B. Liu, L. Chen, Q. Liu, "Memory-efficient LLM training with online
        subspace descent" (2024), arXiv 2408.12857.
    """

    rank: Rank
    optimizer: optax.GradientTransformation = optax.sgd(0.5)
    _: dataclasses.KW_ONLY
    penalty: ArrayLike = 0.0
    first: MatrixBasis | None = None
    side: Side = "short"
    orthonormal: ClassVar[bool] = False

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> OjaState:
        """The first coordinates, and an optimizer for each member of a stack."""
        matrix = super().init(shape, rank, dtype, key)
        return OjaState(matrix, _batched(self.optimizer.init, matrix.ndim - 2)(matrix))

    def start(self, state: OjaState, a: Array, context: RefreshContext) -> OjaState:
        """The basis of the rule for the first one."""
        return state._replace(matrix=_first_rule(self).refresh(state.matrix, a, context))

    def refresh(self, state: OjaState, a: Array, context: RefreshContext) -> OjaState:
        """One step of the optimizer."""
        del context
        p = state.matrix
        norm = jnp.sqrt(jnp.sum(a**2, axis=(-2, -1), keepdims=True))
        a = a / nonzero(norm)
        image = outer(a, cross(p, a))
        gram = cross(p, p)
        gradient = (
            -4 * image
            + 2 * times(image, gram)
            + 2 * times(p, cross(p, image))
            + 4 * self.penalty * times(p, gram - identity_like(gram))
        )
        update = _batched(self.optimizer.update, p.ndim - 2)
        step, optimizer = update(gradient, state.optimizer, p)
        return OjaState(p + step, optimizer)


class CorrelationDescent(MatrixBasis):
    """A basis that descends the error of the gradient and follows the momentum.

    A refresh is one descent step, clipped to norm 1, on ``mean((P Pᵀ a − a)²) · (1 −
    mean_j cos((P m)_j, a_j))``, ``m`` the inner first moment. Every ``recalibrate``
    refreshes instead: ``Q = orth(aᵀP)``, then the left singular vectors of ``a Q``.

    Args:
        rank: see :class:`Basis`.
        step_size: of the descent.
        period: the period of the schedule that this basis is used with.
        recalibrate: how many refreshes there are to one recalibration.
        side: see :class:`Basis`. It is orthonormal only right after a recalibration.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis, schedule = sub.CorrelationDescent(4), sub.Periodic(32)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis, schedule=schedule)

    Reference:
        J. Xiao, S. Sang, T. Zhi et al., "COAP: memory-efficient training with
        correlation-aware gradient projection" (2024), arXiv 2412.00071.
    """

    rank: Rank
    step_size: ArrayLike = 0.1
    _: dataclasses.KW_ONLY
    period: int | Array = 32
    recalibrate: int | Array = 5
    side: Side = "short"
    orthonormal: ClassVar[bool] = False
    uses_momentum: ClassVar[bool] = True
    has_start: ClassVar[bool] = True

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> Array:
        """Random orthonormal columns, whose image the first sketch decomposes."""
        return random_columns(shape, rank, dtype, key)

    def start(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """The left singular vectors of ``a`` on the range of ``aᵀP``."""
        del context
        image = times(a, orthonormalize(cross(a, state)))
        return placed_like(svd(image)[0], state)

    def refresh(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """A descent step, or a recalibration."""
        again = (context.count // self.period) % self.recalibrate == 0
        descended = lambda: self._descend(state, a, context)
        both = lambda: jnp.where(again, self.start(state, a, context), descended())
        return lax.cond(any_member(again), both, descended)

    def _descend(self, p: Array, a: Array, context: RefreshContext) -> Array:
        none = jnp.zeros((*a.shape[:-2], p.shape[-1], a.shape[-1]), a.dtype)
        momentum = none if context.momentum is None else context.momentum
        gradient = jax.grad(_correlation_error)(p, a, lax.stop_gradient(momentum))
        norm = jnp.sqrt(jnp.sum(gradient**2, axis=(-2, -1), keepdims=True))
        return p - self.step_size * gradient / jnp.maximum(norm, 1)


def _correlation_error(p: Array, a: Array, momentum: Array) -> Array:
    """``mean((P Pᵀ a − a)²) · (1 − mean_j cos((P m)_j, a_j))``, summed over a stack."""
    error = jnp.mean((times(p, cross(p, a)) - a) ** 2, axis=(-2, -1))
    lifted = times(p, momentum)
    squares = jnp.sum(lifted**2, axis=-2) * jnp.sum(a**2, axis=-2)
    cosine = jnp.sum(lifted * a, axis=-2) * lax.rsqrt(nonzero(squares))
    return jnp.sum(error * (1 - jnp.mean(cosine, axis=-1)))


class EmaGramState(NamedTuple):
    """The state of :class:`EmaGram`: the averaged ``a aᵀ`` and the basis."""

    gram: Float[Array, "*b p p"]
    matrix: Float[Array, "*b p r"]


class EmaGram(_StatefulBasis):
    """The dominant eigenvectors of a running average of ``a aᵀ``, by power steps.

    ``L ← β L + (1−β) a aᵀ`` on every step; a refresh is ``P ← orth(L P)``. At full rank
    the inner transform then runs in the eigenbasis of the averaged Gram matrix.

    Args:
        rank: see :class:`Basis`.
        decay: ``β``.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis, schedule = sub.EmaGram(4), sub.Periodic(10, when="after")
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis, schedule=schedule)

    Reference:
        N. Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam" (2024), arXiv
        2409.11321, its one-sided form.
    """

    rank: Rank
    decay: ArrayLike = 0.95
    _: dataclasses.KW_ONLY
    side: Side = "short"
    observes: ClassVar[bool] = True

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> EmaGramState:
        """A zero average."""
        gram = jnp.zeros((*shape[:-2], shape[-2], shape[-2]), dtype)
        return EmaGramState(gram, super().init(shape, rank, dtype, key))

    def observe(self, state: EmaGramState, a: Array) -> EmaGramState:
        """Average one more ``a aᵀ``."""
        average = self.decay * state.gram + (1 - self.decay) * outer(a, a)
        return state._replace(gram=average)

    def start(self, state: EmaGramState, a: Array, context: RefreshContext) -> EmaGramState:
        """The leading eigenvectors of the average, at acute angles to one direction."""
        del a
        vectors = leading_eigenvectors(state.gram, context.rank)
        # Their signs are an accident of rounding, which the power steps would hand on.
        direction = jr.normal(jr.key(0), (vectors.shape[-2], 1), vectors.dtype)
        direction = jnp.broadcast_to(direction, vectors.shape)
        angles = jnp.sum(vectors * direction, axis=-2, keepdims=True)
        signed = jnp.where(angles < 0, -vectors, vectors)
        return state._replace(matrix=placed_like(signed, vectors))

    def refresh(
        self, state: EmaGramState, a: Array, context: RefreshContext
    ) -> EmaGramState:
        """One power step with the average."""
        del a, context
        return state._replace(matrix=orthonormalize(times(state.gram, state.matrix)))
