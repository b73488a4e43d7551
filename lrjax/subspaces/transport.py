import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from .._moments import Moments
from .._sharding import select
from ..linalg import carrying_precision, nonzero, outer, times


class BasisChange(eqx.Module):
    """A change of basis, as a transport of moments sees it.

    Attributes:
        overlap: ``C = P_newᵀ P_old (*b, r, r)``.
        projected: the present gradient in the new basis, shaped like the moments.
        on_rows: whether the basis acts on the rows, so that ``m ← C m``; else ``m ← m Cᵀ``.
    """

    overlap: Float[Array, "*h r r"]
    projected: Float[Array, "*b m2 n2"]
    on_rows: bool

    def rotate(self, x: Array, *, squared: bool = False) -> Array:
        """Move coordinates by ``C``, or by the elementwise square of ``C``.

        At the precision in force, at which the moments were gathered, but for bfloat16
        gradients, which they outlive: at full precision these products take a TPU's
        compiler as long as those with the gradient.
        """
        c = self.overlap.astype(x.dtype)
        c = c**2 if squared else c
        precision = carrying_precision()
        if self.on_rows:
            return times(c, x, precision)
        return outer(x, c, precision)


class MomentTransport(eqx.Module):
    """What becomes of the inner moments when the basis changes.

    Attributes:
        moves: whether moments are touched at all.
        aligns: whether the new basis is turned within its span towards the old one first.
    """

    moves: ClassVar[bool] = True
    aligns: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, moments: Moments, change: BasisChange) -> Moments:
        """The moments in the new basis."""


class Keep(MomentTransport):
    """Leave the moments as they are, whatever happens to the basis.

    They then refer to coordinates that no longer exist: cheap, the choice of most
    published methods, and the reason why their basis may change only rarely.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), carry=sub.Keep()
        ... )
    """

    moves: ClassVar[bool] = False

    def __call__(self, moments: Moments, change: BasisChange) -> Moments:
        """The same."""
        del change
        return moments


class Align(MomentTransport):
    """Keep the moments, and choose the new basis of the same span nearest to the old.

    The orthogonal Procrustes problem: ``P_new ← P_new · polar(P_newᵀ P_old)``. Flipped
    signs and swapped columns vanish, so that the moments stay meaningful for elementwise
    inner transforms. It takes a basis whose state is the matrix itself.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), carry=sub.Align()
        ... )
    """

    moves: ClassVar[bool] = False
    aligns: ClassVar[bool] = True

    def __call__(self, moments: Moments, change: BasisChange) -> Moments:
        """The same."""
        del change
        return moments


class Rotate(MomentTransport):
    """Move the first moment into the new basis, ``m ← C m``; keep the second.

    Exact for the part of the moment that the new subspace can hold.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.trace(0.9), sub.RandomOrthonormal(4), carry=sub.Rotate()
        ... )
    """

    def __call__(self, moments: Moments, change: BasisChange) -> Moments:
        """The first moment by ``C``."""
        if moments.first is None:
            return moments
        return moments._replace(first=change.rotate(moments.first))


class RotateVariance(MomentTransport):
    """Move both moments into the new basis, the second by its statistics.

    With the bias-corrected ``m̂ = m/(1−b1ᵗ)``, ``v̂ = v/(1−b2ᵗ)`` and squares elementwise::

        m ← C m
        v ← (1−b2ᵗ) (C²(v̂ − m̂²) + (C m̂)² + e v̄)      e_i = 1 − Σ_j C²_ij

    that is the variance of each new coordinate if the old coordinates were uncorrelated,
    plus its squared mean. A new direction lies to the share ``e_i`` outside the old
    subspace, where no variance is known: there it gets that of the old directions which
    leave, ``v̄ = Σ_j l_j v̂_j / Σ_j l_j`` with ``l_j = 1 − Σ_i C²_ij``. So the sum of ``v̂``
    over the directions is conserved. Without that term variance would leave with every
    direction and none would come in, and a basis that keeps moving would make Adam's steps
    grow and grow. ``|m̂|`` is cut at ``√v̂``, beyond which there is no variance.

    Args:
        b1: decay of the inner first moment.
        b2: decay of the inner second moment.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.Power(4), carry=sub.RotateVariance()
        ... )

    Reference:
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam: adaptive
        optimization from low-dimensional gradient statistics" (2024), arXiv 2410.16103,
        without the last term. Special case: theirs, within one subspace.
    """

    b1: ArrayLike = 0.9
    b2: ArrayLike = 0.999

    def __call__(self, moments: Moments, change: BasisChange) -> Moments:
        """The first moment by ``C``, the second by its statistics."""
        first = None if moments.first is None else change.rotate(moments.first)
        if moments.second is None:
            return moments._replace(first=first)
        seen1, seen2 = _filled(moments.count, self.b1), _filled(moments.count, self.b2)
        old = jnp.maximum(moments.second / seen2, 0)
        mean = jnp.zeros_like(old) if moments.first is None else moments.first / seen1
        mean = jnp.clip(mean, -jnp.sqrt(old), jnp.sqrt(old))
        spread = change.rotate(jnp.maximum(old - mean**2, 0), squared=True)
        inside = spread + change.rotate(mean) ** 2
        return moments._replace(
            first=first, second=(inside + _entering(old, change)) * seen2
        )


def _entering(old: Array, change: BasisChange) -> Array:
    """The variance of the new directions outside the old subspace, ``e v̄``."""
    squares = change.overlap.astype(old.dtype) ** 2
    entering = jnp.clip(1 - jnp.sum(squares, axis=-1), 0, 1)
    leaving = jnp.clip(1 - jnp.sum(squares, axis=-2), 0, 1)
    weights = leaving / nonzero(jnp.sum(leaving, axis=-1, keepdims=True))
    if change.on_rows:
        return entering[..., :, None] * times(weights[..., None, :], old)
    return times(old, weights[..., :, None]) * entering[..., None, :]


def _filled(count: Array | None, decay: ArrayLike) -> ArrayLike:
    """``1 − decayᵗ``, the share of an average from zero that holds data."""
    if count is None:
        return 1.0
    # Nothing is known before the first step, and nothing is there to be divided.
    return jnp.where(count > 0, 1 - decay**count, 1)


class SeededReset(MomentTransport):
    """Forget the moments, and start as if all gradients had been like the present one.

    ``m ← (1−b1ᵗ) R``, ``v ← (1−b2ᵗ) mean_j R_ij²`` over each coordinate ``i`` of the basis,
    so that the bias-corrected moments are ``R`` and its mean squares: the square of a
    single entry would be no estimate, and small ones would make large steps for as long
    as Adam remembers. A reset to zero under Adam's running step count makes the next
    updates several times too large; this one starts at the right size. Moments whose
    state does not count its steps are set to zero.

    Args:
        b1: decay of the inner first moment.
        b2: decay of the inner second moment.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SelectedRows(4), carry=sub.SeededReset()
        ... )
    """

    b1: ArrayLike = 0.9
    b2: ArrayLike = 0.999

    def __call__(self, moments: Moments, change: BasisChange) -> Moments:
        """Moments of the present gradient."""
        fill = lambda decay: 0.0 if moments.count is None else 1 - decay**moments.count
        r = change.projected
        axis = -1 if change.on_rows else -2
        squares = jnp.mean(r**2, axis=axis, keepdims=True)
        first = fill(self.b1) * r
        second = fill(self.b2) * jnp.broadcast_to(squares, r.shape)
        return Moments(
            None if moments.first is None else first,
            None if moments.second is None else second,
            moments.count,
        )


class Reset(MomentTransport):
    """Set the moments to zero.

    Right for inner transforms without bias correction; under Adam prefer
    :class:`SeededReset`.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.trace(0.9), sub.SVD(4), carry=sub.Reset()
        ... )
    """

    def __call__(self, moments: Moments, change: BasisChange) -> Moments:
        """Zeros."""
        del change
        zeros = lambda x: jax.tree.map(jnp.zeros_like, x)
        return Moments(zeros(moments.first), zeros(moments.second), moments.count)


def carry_moments(
    transport: MomentTransport,
    moments: list[Moments],
    old: Any,
    new: Any,
    a: Float[Array, "*b m n"],
    done: Bool[Array, "*h"],
    turned: tuple[Array, int] | None,
) -> list[Moments]:
    """Move moments from an old to a new projector, of the turned columns alone if given."""
    if turned is None:
        change = BasisChange(new.overlap(old), new.beside(a).project(a), new.on_rows)
        return [_carry_where(transport, m, change, done) for m in moments]
    first, size = turned
    old, new = (x.columns(first, size) for x in (old, new))
    change = BasisChange(new.overlap(old), new.beside(a).project(a), new.on_rows)
    cut = lambda x: lax.dynamic_slice_in_dim(x, first, size, axis=new.axis)
    put = lambda part, x: lax.dynamic_update_slice_in_dim(x, part, first, axis=new.axis)

    def carry_block(m: Moments) -> Moments:
        part = m._replace(first=_apply(cut, m.first), second=_apply(cut, m.second))
        part = _carry_where(transport, part, change, done)
        return m._replace(
            first=_apply(put, part.first, m.first),
            second=_apply(put, part.second, m.second),
        )

    return [carry_block(m) for m in moments]


def _apply(f: Callable, *x: Array | None) -> Array | None:
    return None if x[0] is None else f(*x)


def _carry_where(transport, m: Moments, change: BasisChange, done: Array) -> Moments:
    new = transport(m, change)
    keep = lambda new, old: select(done, new, old)
    return m._replace(
        first=_apply(keep, new.first, m.first), second=_apply(keep, new.second, m.second)
    )
