import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from .._sharding import placed_beside
from ..linalg import product_rounding
from .bases import Projector


class Projected(NamedTuple):
    """One step of one leaf, as a lift sees it.

    Attributes:
        gradient: ``a (*b, m, n)``.
        projected: ``R``, either ``Pᵀ a (*b, r, n)`` or ``a P (*b, m, r)``.
        step: what the inner transform made of ``R``, ``N``, of the same shape.
        projector: the basis, with ``project`` and ``lift``.
        key: a key of this leaf and step.
        count: the number of steps before this one.
    """

    gradient: Float[Array, "*b m n"]
    projected: Float[Array, "*b m2 n2"]
    step: Float[Array, "*b m2 n2"]
    projector: Projector
    key: PRNGKeyArray
    count: Int[Array, ""]


class Lift(eqx.Module):
    """How the inner step and what the subspace left out become the update.

    Attributes:
        needs_orthonormal: whether it takes ``a − P Pᵀ a`` for the part left out.
    """

    needs_orthonormal: ClassVar[bool] = False

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The state for gradients of a shape ``(*b, m, n)``, a pytree of arrays."""
        del shape, dtype
        return ()

    @abc.abstractmethod
    def __call__(self, x: Projected, state: Any) -> tuple[Float[Array, "*b m n"], Any]:
        """The update and the new state."""


class Project(Lift):
    """``U = scale · P N``: the update stays in the subspace.

    Args:
        scale: factor.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), lift=sub.Project(0.25)
        ... )
    """

    scale: ArrayLike = 1.0

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The lifted step."""
        return x.projector.lift(x.step) * self.scale, state


class Residual(Lift):
    """``U = scale · P N + weight · (a − P R)``: plain descent outside the subspace.

    Args:
        weight: factor of the residual.
        scale: factor of the inner step.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), lift=sub.Residual(0.1)
        ... )

    Reference:
        T. Nguyen, H. L. Nguyen, "Subset-norm and subspace-momentum: faster
        memory-efficient adaptive optimization with convergence guarantees" (2024), arXiv
        2411.07120.
    """

    weight: ArrayLike = 1.0
    scale: ArrayLike = 1.0
    needs_orthonormal: ClassVar[bool] = True

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The lifted step and the weighted residual."""
        inside = x.projector.lift(
            jnp.multiply(self.scale, x.step) - jnp.multiply(self.weight, x.projected)
        )
        return inside + self.weight * x.gradient, state


class Blend(Lift):
    """``U = P N + (1−b1)(a − P R)``: the present gradient enters whole.

    For an inner ``optax.ema(b1, debias=False)`` this is ``b1 · P m_old + (1−b1) · a``:
    the past comes from the compressed momentum, the present uncompressed. An identity,
    so ``P`` need not be orthonormal.

    Args:
        b1: decay of the inner average.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.ema(0.9, debias=False), sub.Gaussian(4), lift=sub.Blend(0.9)
        ... )

    Reference:
        Y. Hao, Y. Cao, L. Mou, "Flora: low-rank adapters are secretly gradient
        compressors" (2024), arXiv 2402.03293.
    """

    b1: ArrayLike = 0.9

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The past from the subspace, the present as it is."""
        new = 1 - self.b1
        return x.projector.lift(x.step - new * x.projected) + new * x.gradient, state


class SignResidual(Lift):
    """``U = scale · P N + weight · sign(a − P R)``: sign descent outside the subspace.

    Args:
        weight: factor of the residual, the ratio of the two learning rates.
        scale: factor of the inner step.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), lift=sub.SignResidual()
        ... )

    Reference:
        P. Zmushko et al., "FRUGAL: memory-efficient optimization by reducing state
        overhead for scalable training" (2024), arXiv 2411.07837.
    """

    weight: ArrayLike = 1.0
    scale: ArrayLike = 1.0
    needs_orthonormal: ClassVar[bool] = True

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The lifted step and the signs of the residual."""
        inside = jnp.multiply(self.scale, x.projector.lift(x.step))
        return inside + jnp.multiply(self.weight, jnp.sign(_left_out(x))), state


def _left_out(x: Projected) -> Float[Array, "*b m n"]:
    """``a − P R``, with exact zeros where it is no larger than rounding.

    An entry of ``P R`` is known to the rounding error of the whole vector along the
    projected axis: the basis mixes all of its entries.
    """
    axis = x.projector.axis
    outside = x.gradient - x.projector.lift(x.projected)
    error = product_rounding(x.gradient.dtype, x.gradient.shape[axis])
    # Not in squares, which vanish for gradients that are tiny and not zero.
    known = jnp.abs(outside) > error * jnp.sqrt(_squares(x.gradient, axis))
    return jnp.where(known, outside, 0)


def _squares(x: Array, axis: int) -> Array:
    """The sums of squares along an axis, which stays with length one."""
    return jnp.sum(x**2, axis=axis, keepdims=True)


def _scaling(x: Projected, over: str) -> Float[Array, "..."]:
    """``φ = ‖N‖/‖R‖``, one for each vector along the projected axis, or each matrix.

    A vector whose projection is of rounding size, because it is orthogonal to the basis,
    has no ``φ`` of its own: it takes that of all others together, zero if there are none.
    """
    axis = x.projector.axis
    top, bottom = _squares(x.step, axis), _squares(x.projected, axis)
    error = product_rounding(bottom.dtype, x.gradient.shape[axis])
    known = bottom > error**2 * placed_beside(_squares(x.gradient, axis), bottom, (-2, -1))
    top, bottom = jnp.where(known, top, 0), jnp.where(known, bottom, 0)
    ratio = lambda t, b: jnp.where(b > 0, jnp.sqrt(t / jnp.where(b > 0, b, 1)), 0)
    whole = ratio(*(jnp.sum(y, axis=(-2, -1), keepdims=True) for y in (top, bottom)))
    return whole if over == "tensor" else jnp.where(known, ratio(top, bottom), whole)


def limit_growth(
    norm: Float[Array, "*b"], previous: Float[Array, "*b"], max_growth: ArrayLike
) -> Float[Array, "*b"]:
    """The factor that keeps ``norm`` at or below ``max_growth · previous``.

    One where ``previous`` is zero, which stands for "nothing known yet".
    """
    limit = max_growth * previous
    return jnp.where((previous > 0) & (norm > limit), limit / norm, 1)


class ScaledResidual(Lift):
    """The residual, scaled as the inner transform scaled the subspace.

    ``U = scale · P N + S`` with ``S = (a − P R) diag(φ)``, ``φ_j = ‖N_j‖/‖R_j‖`` for each
    vector ``j`` along the projected axis, the norm of ``S`` limited to ``max_growth``
    times that of the last step. A vector orthogonal to the basis has ``φ_j = 0/0`` and
    takes the ``φ`` of all others together. The state is the last norm of ``S``, one number
    a matrix.

    Args:
        scale: factor of the inner step alone.
        max_growth: the limit; None for no limit.
        over: ``"channel"``: one ``φ`` for each vector; ``"tensor"``: one for the matrix.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), lift=sub.ScaledResidual()
        ... )

    Reference:
        X. Chen et al., "Fira: can we achieve full-rank training of LLMs under low-rank
        constraint?" (2024), arXiv 2410.01623.
    """

    scale: ArrayLike = 1.0
    _: dataclasses.KW_ONLY
    max_growth: ArrayLike | None = 1.01
    over: Literal["channel", "tensor"] = "channel"
    needs_orthonormal: ClassVar[bool] = True

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """No norm yet."""
        return () if self.max_growth is None else jnp.zeros(shape[:-2], dtype)

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The lifted step and the scaled residual."""
        phi = _scaling(x, self.over)
        if self.max_growth is not None:
            norm = self._norm_left_out(x, phi)
            factor = limit_growth(norm, state, self.max_growth)
            # A step that leaves nothing out says nothing of the next one.
            state = jnp.where(norm > 0, norm * factor, state)
            phi = phi * factor[..., None, None]
        inside = x.projector.lift(jnp.multiply(self.scale, x.step) - phi * x.projected)
        return inside + placed_beside(phi, x.gradient, (-2, -1)) * x.gradient, state

    def _norm_left_out(self, x: Projected, phi: Array) -> Float[Array, "*b"]:
        """``‖S‖``, or zero where it is nothing but rounding.

        ``‖a_j − P R_j‖² = ‖a_j‖² − ‖R_j‖²`` by orthonormality: no product with P.
        """
        axis = x.projector.axis
        inside = _squares(x.projected, axis)
        total = placed_beside(_squares(x.gradient, axis), inside, (-2, -1))
        outside = jnp.maximum(total - inside, 0)
        whole = lambda y: jnp.sum(phi**2 * y, axis=(-2, -1))
        # The difference of two squares is known to twice the error of a root.
        error = 2 * product_rounding(total.dtype, x.gradient.shape[axis])
        known = whole(outside) > error * whole(total)
        return jnp.where(known, jnp.sqrt(whole(outside)), 0)


class ScaledGradient(Lift):
    """The raw gradient, scaled as the inner transform scaled its projection.

    ``U = scale · a diag(φ)``, ``φ_j = ‖N_j‖/‖R_j‖``, its norm limited to ``max_growth``
    times that of the last step. The direction is the gradient's own; the subspace only
    measures step sizes, so it may be random and of very low rank. The state is the last
    norm, one number a matrix.

    Args:
        scale: factor.
        max_growth: the limit; None for no limit.
        over: ``"channel"``: one ``φ`` for each vector; ``"tensor"``: one for the matrix.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.Gaussian(4), lift=sub.ScaledGradient()
        ... )

    Reference:
        H. Zhu et al., "APOLLO: SGD-like memory, AdamW-level performance" (2024), arXiv
        2412.05270.
    """

    scale: ArrayLike = 1.0
    _: dataclasses.KW_ONLY
    max_growth: ArrayLike | None = 1.01
    over: Literal["channel", "tensor"] = "channel"

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """No norm yet."""
        return () if self.max_growth is None else jnp.zeros(shape[:-2], dtype)

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The scaled gradient."""
        phi = placed_beside(_scaling(x, self.over), x.gradient, (-2, -1))
        update = x.gradient * phi
        if self.max_growth is not None:
            norm = jnp.sqrt(jnp.sum(update**2, axis=(-2, -1)))
            factor = limit_growth(norm, state, self.max_growth)
            state = jnp.where(norm > 0, norm * factor, state)
            update = update * factor[..., None, None]
        return jnp.multiply(self.scale, update), state


class SampledResidual(Lift):
    """By the toss of a coin the subspace or the rest of the space, unbiased.

    With probability ``q``: ``U = f(a − P R)/q``; else ``U = P N/(1−q)``.

    Args:
        probability: ``q`` in (0, 1).
        transform: ``f``, for example :func:`lrjax.linalg.polar`; None for none.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.trace(0.9), sub.SVD(4), lift=sub.SampledResidual(0.2)
        ... )

    Reference:
        R. Pan, Y. Luo, Y. Liu, Y. You, T. Zhang, "Unbiased gradient low-rank projection"
        (2025), arXiv 2510.17802.
    """

    probability: ArrayLike = 0.5
    transform: Callable[[Array], Array] | None = None
    needs_orthonormal: ClassVar[bool] = True

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """One of the two."""
        outside = x.gradient - x.projector.lift(x.projected)
        outside = outside if self.transform is None else self.transform(outside)
        inside = x.projector.lift(x.step) / (1 - self.probability)
        coin = jr.bernoulli(x.key, self.probability)
        return jnp.where(coin, outside / self.probability, inside), state


class Transformed(Lift):
    """Apply a function to the lifted update, ``U = f(P N)``.

    A nonlinearity inside the subspace and the same one outside give different
    methods: Lion's sign, for example, belongs here in online subspace descent.

    Args:
        transform: ``f``, from ``(*b, m, n)`` to the same.
        base: the lift before it.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.ema(0.9), sub.SVD(4), lift=sub.Transformed(jnp.sign)
        ... )
    """

    transform: Callable[[Array], Array]
    base: Lift = Project()

    @property
    def needs_orthonormal(self) -> bool:
        """If the base does."""
        return self.base.needs_orthonormal

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """That of the base."""
        return self.base.init(shape, dtype)

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The function of what the base gives."""
        update, state = self.base(x, state)
        return self.transform(update), state
