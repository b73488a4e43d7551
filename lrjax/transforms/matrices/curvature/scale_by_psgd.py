import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._matrices import check_real
from ...._sharding import einsum
from ....linalg import (
    increment,
    nonzero,
    tall_apply,
    tall_gram,
    tall_inner,
    tall_mix,
    working_dtype,
)


class ScaleByPSGDState(NamedTuple):
    """The state of :func:`scale_by_psgd`.

    Attributes:
        count: the number of steps.
        left: ``U``, a tree like the parameters with one more axis of length ``r``.
        right: ``V``, like ``U``.
        diagonal: ``d``, a tree like the parameters.
        limits: running bounds on the size of the steps of ``d``, ``U`` and ``V``; zero
            until there was a usable gradient.
    """

    count: Int[Array, ""]
    left: PyTree
    right: PyTree
    diagonal: PyTree
    limits: Float[Array, "3"]


class Factor(NamedTuple):
    """``Q = (I + U Vᵀ) diag(d)`` on flat lists of leaves."""

    u: list[Array]
    v: list[Array]
    d: list[Array]

    def times(self, x: list[Array]) -> list[Array]:
        """``Q x``."""
        x = _multiply(self.d, x)
        return _add(x, tall_apply(self.u, tall_inner(self.v, x)))

    def transpose_times(self, x: list[Array]) -> list[Array]:
        """``Qᵀ x``."""
        return _multiply(self.d, _add(x, tall_apply(self.v, tall_inner(self.u, x))))


@checks_trees
def scale_by_psgd(
    rank: int = 10,
    rate: ArrayLike = 0.1,
    *,
    damping: ArrayLike = 1e-9,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply by a low-rank plus diagonal preconditioner that is fitted while training.

    All parameters together are one vector of length ``N``; with ``U, V (N, r)``, ``d (N)``
    the update is ``P g`` with::

        P = QᵀQ        Q = (I + U Vᵀ) diag(d)

    Each step fits ``P`` by one step down ``hᵀ P h + vᵀ P⁻¹ v`` over the group of such
    ``Q``, that is by a small multiplicative change, which can make ``Q`` neither singular
    nor of another sign::

        a = Q h    b = Q⁻ᵀ v    x = Qᵀ a    w = Q⁻¹ b
        d ← (1 − ρ (x h − v w) / ℓ) d              ℓ at least the largest entry
        I + U Vᵀ ← (I − ρ (a aᵀ − b bᵀ) V Vᵀ / ℓ) (I + U Vᵀ)     even steps, moves U
        I + U Vᵀ ← (I − ρ U Uᵀ (a aᵀ − b bᵀ) / ℓ) (I + U Vᵀ)     odd steps, moves V

    By default ``h`` is the gradient and ``v`` Gaussian noise: then ``P`` tends to
    ``E[g gᵀ]^(−½)``, which whitens. Given ``update(…, pair=(v, h))`` with Gaussian ``v``
    and the Hessian-vector product ``h = H v`` it tends to ``|H|⁻¹``, Newton's method.
    The state has ``(2 r + 1) N`` numbers; a step costs ``O(N r²)`` and solutions of
    systems of size ``r``. Leaves keep their sharding.

    Args:
        rank: ``r``.
        rate: ``ρ``, between zero and one.
        damping: noise of this size, relative to ``v``, is added to gradients, so that the
            preconditioner of a vanishing one stays bounded.
        key: of the first ``U``, ``V`` and of the noise; ``jax.random.key(0)`` by default.

    Returns:
        The transform. A gradient that is zero or not finite, or such a pair, leaves the
        preconditioner as it is; a non-finite gradient gives a zero update.

    Raises:
        ValueError: for a rank below one.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_psgd(1)
        >>> g = {"weight": jnp.array([100.0, -100.0])}
        >>> updates, state = tx.update(g, tx.init(g))
        >>> print(jnp.abs(updates["weight"]).max() < 3)
        True

    Reference:
        X.-L. Li, "Black box Lie group preconditioners for SGD" (2022), arXiv 2211.04422;
        O. Pooladzandi, X.-L. Li, "Curvature-informed SGD via general purpose Lie-group
        preconditioners" (2024), arXiv 2402.04553. Special case: the inverse Hessian, if
        it has the form of ``P``, is a fixed point for every ``v``.
    """
    if rank < 1:
        raise ValueError(f"scale_by_psgd needs rank >= 1, got {rank}.")
    base = lambda: jr.key(0) if key is None else key

    def init(params):
        check_real("scale_by_psgd", params)
        leaves, treedef = jax.tree.flatten(params)
        dtypes = [working_dtype(x.dtype) for x in leaves]
        draw = lambda key: [
            jr.normal(k, (*x.shape, rank), dtype) + jnp.zeros_like(x, dtype)[..., None]
            for k, x, dtype in zip(_keys(key, leaves), leaves, dtypes, strict=True)
        ]
        # Norms of √0.1: the low-rank part starts small, and not at its fixed point zero.
        start = lambda x: _scale(x, jnp.sqrt(0.1 / _squares(x))) if x else x
        left, right = (start(draw(k)) for k in jr.split(jr.fold_in(base(), 0)))
        ones = [jnp.ones_like(x, t) for x, t in zip(leaves, dtypes, strict=True)]
        return ScaleByPSGDState(
            jnp.zeros((), jnp.int32),
            *(treedef.unflatten(x) for x in (left, right, ones)),
            limits=jnp.zeros(3, jnp.result_type(jnp.float32, *dtypes)),
        )

    def update(updates, state, params=None, *, pair=None, **extra):
        del params, extra
        leaves, treedef = jax.tree.flatten(updates)
        g = [x.astype(working_dtype(x.dtype)) for x in leaves]
        factor = Factor(*(treedef.flatten_up_to(x) for x in state[1:4]))
        if pair is None:
            at = jr.fold_in(jr.fold_in(base(), 1), state.count)
            v = [
                jr.normal(k, x.shape, x.dtype) for k, x in zip(_keys(at, g), g, strict=True)
            ]
            h = [
                x + (damping + jnp.finfo(x.dtype).eps * jnp.abs(x)) * noise
                for x, noise in zip(g, v, strict=True)
            ]
            size = _squares(g)
        else:
            v, h = (_like(g, treedef.flatten_up_to(x)) for x in pair)
            size = _squares(h)
        usable = jnp.isfinite(size) & (size > 0)
        fitted, limits = _fit(factor, v, h, state.limits, rate, state.count)
        keep = lambda new, old: jnp.where(usable, new, old).astype(old.dtype)
        fitted, limits = jax.tree.map(keep, (fitted, limits), (factor, state.limits))
        out = fitted.transpose_times(fitted.times(g))
        finite = jnp.isfinite(_squares(g))
        out = [
            jnp.where(finite, u, 0).astype(x.dtype)
            for u, x in zip(out, leaves, strict=True)
        ]
        return treedef.unflatten(out), ScaleByPSGDState(
            increment(state.count),
            *(treedef.unflatten(x) for x in fitted),
            limits=limits,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _fit(
    q: Factor, v: list[Array], h: list[Array], limits: Array, rate: ArrayLike, count: Array
) -> tuple[Factor, Array]:
    """One step of the preconditioner on a pair.

    The tall factors meet two vectors, ``d h`` and ``v / d``. What they make of ``a`` and
    ``b`` is known from these four products and the Gram matrices.
    """
    fresh = limits[0] == 0
    scale = jnp.where(fresh, _first_scale(v, h), 1)
    q, uu, vv, core = _balanced(q)
    q = q._replace(d=_scale(q.d, scale))
    dh, vd = _multiply(q.d, h), _divide(v, q.d)
    u_dh, u_vd = tall_inner(q.u, dh), tall_inner(q.u, vd)
    v_dh, v_vd = tall_inner(q.v, dh), tall_inner(q.v, vd)
    # One factorization for both systems: on a GPU each of these is a dozen kernels.
    inverse = jnp.linalg.inv(core)
    ub = _product(u_vd, inverse)
    ua, va, vb = u_dh + _product(uu, v_dh), _product(core, v_dh), v_vd - _product(vv, ub)
    a, b = _add(dh, tall_apply(q.u, v_dh)), _add(vd, tall_apply(q.v, -ub))
    along_a = _add(a, tall_apply(q.v, ua))
    x = _multiply(q.d, along_a)
    w = _divide(_add(b, tall_apply(q.u, -_product(inverse, vb))), q.d)
    slope = [s * t - y * z for s, t, y, z in zip(x, h, v, w, strict=True)]
    size = _largest(_multiply(x, h)) + _largest(_multiply(v, w))
    limit_d = _limit(limits[0], size)
    d = [t - rate / limit_d * s * t for t, s in zip(q.d, slope, strict=True)]
    norm_a, norm_b = _norm(a), _norm(b)

    def move_left():
        size = norm_a * _norm_by(vv, va) + norm_b * _norm_by(vv, vb)
        limit = _limit(limits[1], size)
        turned = (_product(va, core), _product(vb, core))
        u = _minus_outer(q.u, rate / limit, a, turned[0], b, turned[1])
        return u, q.v, limit, limits[2]

    def move_right():
        size = norm_a * _norm_by(uu, ua) + norm_b * _norm_by(uu, ub)
        limit = _limit(limits[2], size)
        v = _minus_outer(q.v, rate / limit, along_a, ua, vd, ub)
        return q.u, v, limits[1], limit

    u, v, limit_u, limit_v = lax.cond(any_member(count % 2 == 0), move_left, move_right)
    return Factor(u, v, d), jnp.stack([limit_d, limit_u, limit_v])


def _first_scale(v: list[Array], h: list[Array]) -> Array:
    """The number ``c`` for which ``c² h`` is of the size of ``v``, by fourth moments."""
    largest = _largest(h)
    largest = nonzero(largest)
    fourth = lambda x: _total([jnp.sum(y**4) for y in x])
    ratio = fourth(v) / fourth(_scale(h, 1 / largest))
    return (ratio**0.25 / largest) ** 0.5


def _balanced(q: Factor) -> tuple[Factor, Array, Array, Array]:
    """Move ``U``, ``V`` towards equal Gram matrices; ``U Vᵀ`` stays.

    Returns:
        The factor, the Gram matrices of ``U`` and ``V``, and the core ``I + Vᵀ U``.
    """
    uu, vv, vu = tall_gram(q.u, q.u), tall_gram(q.v, q.v), tall_gram(q.v, q.u)
    root = (jnp.trace(uu) / jnp.trace(vv)) ** 0.25
    uu, vv = uu / root**2, vv * root**2
    e = 0.1 * (uu - vv) / (jnp.trace(uu) + jnp.trace(vv))
    # ``I − e + e²/2`` times ``I + e + e²/2`` is ``I + q``, and |q| = |e|⁴/4 < 3e-5: the
    # inverse is a series that takes no factorization.
    identity, square = jnp.eye(e.shape[-1], dtype=e.dtype), _product(e, e)
    even = identity + 0.5 * square
    rest = 0.25 * _product(square, square)
    inverse = _product(even + e, identity - rest + _product(rest, rest)).T
    turn = even - e  # symmetric
    moved = q._replace(u=tall_mix(q.u, turn / root), v=tall_mix(q.v, inverse * root))
    by = lambda left, x, right: _product(_product(left.T, x), right)
    core = identity + by(inverse, vu, turn)
    return moved, by(turn, uu, turn), by(inverse, vv, inverse), core


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _norm_by(gram: Array, x: Array) -> Array:
    """``‖T x‖`` from ``TᵀT``."""
    return jnp.sqrt(jnp.maximum(_product(x, _product(gram, x)), 0))


def _limit(old: Array, size: Array) -> Array:
    """A running bound of a step's size, that no step exceeds."""
    new = jnp.maximum(0.9 * old + 0.1 * size, size)
    return nonzero(new)


def _keys(key: PRNGKeyArray, leaves: list[Any]) -> list[PRNGKeyArray]:
    return [jr.fold_in(key, i) for i in range(len(leaves))]


# Vectors and tall matrices are lists of leaves, so that no leaf is reshaped or moved.


def _total(parts: list[Array]) -> Array:
    return functools.reduce(operator.add, parts)


def _minus_outer(tall, rate, a, ca, b, cb) -> list[Array]:
    """``T − rate (a caᵀ − b cbᵀ)``."""
    outer = lambda x, c: einsum("...,r->...r", x, c)
    triples = zip(tall, a, b, strict=True)
    return [t - rate * (outer(x, ca) - outer(y, cb)) for t, x, y in triples]


def _like(x: list[Array], y: list[Any]) -> list[Array]:
    return [jnp.asarray(t, s.dtype) for s, t in zip(x, y, strict=True)]


def _add(x, y) -> list[Array]:
    return [s + t for s, t in zip(x, y, strict=True)]


def _multiply(x, y) -> list[Array]:
    return [s * t for s, t in zip(x, y, strict=True)]


def _divide(x, y) -> list[Array]:
    return [s / t for s, t in zip(x, y, strict=True)]


def _scale(x: list[Array], factor: Array) -> list[Array]:
    return [y * factor.astype(y.dtype) for y in x]


def _squares(x: list[Array]) -> Array:
    return _total([jnp.sum(y**2) for y in x])


def _norm(x: list[Array]) -> Array:
    return jnp.sqrt(_squares(x))


def _largest(x: list[Array]) -> Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(y)) for y in x]))
