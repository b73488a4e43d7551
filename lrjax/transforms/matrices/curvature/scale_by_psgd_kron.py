from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, PyTree

from ...._arguments import checks_trees
from ...._matrices import Where, map_init, map_matrices
from ...._sharding import placed_as_state, placed_beside, placed_like
from ....linalg import identity_like, nonzero, outer, times, working_dtype


class ScaleByPSGDKronState(NamedTuple):
    """The state of :func:`scale_by_psgd_kron`, trees like the parameters.

    Leaves that are not chosen hold ``optax.MaskedNode()``.

    Attributes:
        left: ``Q_l (*b, m, m)``, or its diagonal ``(*b, m, 1)`` where ``m`` is long.
        right: ``Q_r (*b, n, n)``, or its diagonal ``(*b, n, 1)``.
        left_limit: running bounds on the size of the steps of ``Q_l``, one a matrix; zero
            until there was a usable gradient.
        right_limit: those of ``Q_r``.
    """

    left: PyTree
    right: PyTree
    left_limit: PyTree
    right_limit: PyTree


@checks_trees
def scale_by_psgd_kron(
    rate: ArrayLike = 0.1,
    *,
    damping: ArrayLike = 1e-9,
    max_side: int = 8192,
    where: Where | None = None,
) -> optax.GradientTransformation:
    """Whiten each matrix from both sides by factors that are fitted while training.

    The update of a matrix ``G (m, n)`` is ``X = P_l G P_r`` with ``P_l = Q_l²``,
    ``P_r = Q_r²``, symmetric and positive. Each step first fits them to the gradient, by a
    small multiplicative change, which can make them neither singular nor of another sign::

        T = X Xᵀ + σ² ‖P_r‖_F² P_l²        A = ρ/(2ℓ) (T − n I)        ℓ ≥ ‖T‖₂ + n
        Q_l ← (I − A) Q_l (I − A)

    and ``Q_r`` likewise, from ``Xᵀ X`` and ``m``. It stands still where ``E[X Xᵀ] = n I``
    and ``E[Xᵀ X] = m I``: the entries of ``X`` then have a mean square of one. ``σ`` is
    the size of a noise on the gradients, over which ``T`` is the mean, so that the factors
    stay bounded where a gradient vanishes. The first gradient sets the size of both. The
    state has ``m² + n²`` numbers a matrix; only products of matrices are needed.

    Args:
        rate: ``ρ``, between zero and one.
        damping: ``σ`` is this, and the rounding error of the gradient's root mean square.
        max_side: of a side that is longer, the factor is a diagonal.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat; leading axes are a stack of matrices. By default matrices but
            embeddings and heads. The others pass unchanged.

    Returns:
        The transform. A gradient that is zero or not finite leaves the factors as they
        are, and gives a zero update.

    Raises:
        ValueError: at ``init``, if ``where`` chooses no leaf, or one that is no matrix.
        TypeError: for complex leaves.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_psgd_kron(where=lambda path, shape: True)
        >>> g = jnp.diag(jnp.array([1000.0, 10.0]))
        >>> state, step = tx.init(g), jax.jit(tx.update)
        >>> for _ in range(200):
        ...     updates, state = step(g, state)
        >>> print(updates.round(3) + 0.0)
        [[1.414 0.   ]
         [0.    1.414]]

    Reference:
        O. Pooladzandi, X.-L. Li, "Curvature-informed SGD via general purpose Lie-group
        preconditioners" (2024), arXiv 2402.04553; X.-L. Li, "Preconditioned stochastic
        gradient descent" (2015), arXiv 1512.04202; the change of ``Q`` is "QUAD" in its
        author's code. Special case: a constant square gradient of full rank tends to
        ``√m`` times its polar factor.
    """

    def init(params):
        def start(leaf, x):
            a = jnp.zeros_like(leaf.view(x), working_dtype(x.dtype))
            left, right = (_identity(a, size, max_side) for size in leaf.sides)
            limit = placed_as_state(jnp.zeros((*leaf.batch, 1, 1), a.dtype), a)
            return left, right, limit, limit

        state = map_init("scale_by_psgd_kron", where, start, params, 4)
        return ScaleByPSGDKronState(*state)

    def update(updates, state, params=None):
        del params

        def one(leaf, g, left, right, left_limit, right_limit):
            a, size = _usable(leaf.view(g).astype(left.dtype))
            # Each device has a part of the factors, and for a step all of them, once.
            whole = lambda q, limit: _Side(placed_beside(q, a, (None, None)), limit)
            old = whole(left, left_limit), whole(right, right_limit)
            new = _fitted(a, size, *old, rate, damping)
            u = leaf.restore(_whitened(a, new[0].root, new[1].root), g)
            roots = placed_like(new[0].root, left), placed_like(new[1].root, right)
            return u.astype(g.dtype), *roots, *(x.limit for x in new)

        out, *new = map_matrices("scale_by_psgd_kron", where, one, updates, *state)
        return out, ScaleByPSGDKronState(*new)

    return optax.GradientTransformation(init, update)


class _Side(NamedTuple):
    """The factor ``Q`` of one side and the running bound of its steps."""

    root: Float[Array, "*b m m"] | Float[Array, "*b m 1"]
    limit: Float[Array, "*b 1 1"]


def _identity(a: Float[Array, "*b m n"], size: int, max_side: int) -> Array:
    """The first factor of a side of this length of the matrices ``a``."""
    batch = a.shape[:-2]
    if size > max_side:
        return placed_as_state(jnp.ones((*batch, size, 1), a.dtype), a)
    return identity_like(placed_as_state(jnp.zeros((*batch, size, size), a.dtype), a))


def _usable(a: Float[Array, "*b m n"]) -> tuple[Array, Float[Array, "*b 1 1"]]:
    """Gradients and their mean squares, zeros in the place of what is not finite."""
    size = jnp.mean(a**2, axis=(-2, -1), keepdims=True)
    finite = jnp.isfinite(size)
    return jnp.where(finite, a, 0), jnp.where(finite, size, 0)


def _fitted(
    a: Float[Array, "*b m n"], size: Array, left: _Side, right: _Side, rate, damping
) -> tuple[_Side, _Side]:
    """Both factors after a step towards whitening one gradient."""
    q, k = (jnp.where(x.limit == 0, _first(x.root, a), x.root) for x in (left, right))
    x = _whitened(a, q, k)
    p, s = _square(q), _square(k)
    variance = (damping + jnp.finfo(a.dtype).eps * jnp.sqrt(size)) ** 2
    energy = lambda p: variance * jnp.sum(p**2, axis=(-2, -1), keepdims=True)
    new = _balanced(
        _moved(_Side(q, left.limit), x, energy(s) * _square(p), rate),
        _moved(_Side(k, right.limit), x.mT, energy(p) * _square(s), rate),
    )
    keep = lambda n, old: jnp.where(size > 0, placed_like(n, old), old).astype(old.dtype)
    left, right = jax.tree.map(keep, new, (left, right))
    return left, right


def _first(x: Array, a: Array) -> Array:
    """A multiple of the identity, so that ``X`` is of size one by its fourth moment."""
    largest = nonzero(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True))
    fourth = jnp.mean((a / largest) ** 4, axis=(-2, -1), keepdims=True)
    return x * (nonzero(fourth) ** 0.25 * largest) ** -0.25


def _is_diagonal(q: Array) -> bool:
    return q.shape[-1] != q.shape[-2]


def _square(q: Array) -> Array:
    return q**2 if _is_diagonal(q) else times(q, q)


def _apply(q: Array, a: Array) -> Array:
    """``Q² a``."""
    return placed_like(q**2 * a if _is_diagonal(q) else times(q, times(q, a)), a)


def _whitened(a: Array, q: Array, k: Array) -> Array:
    """``Q_l² a Q_r²``."""
    return _apply(k, _apply(q, a).mT).mT


def _moved(side: _Side, x: Array, noise: Array, rate: ArrayLike) -> _Side:
    """One step of the factor whose side is the first axis of ``X``."""
    q, goal = side.root, x.shape[-1]
    if _is_diagonal(q):
        t = jnp.sum(x**2, axis=-1, keepdims=True) + noise
        limit = _limit(side.limit, jnp.max(t, axis=(-2, -1), keepdims=True) + goal)
        return _Side(q * (1 - rate / (2 * limit) * (t - goal)) ** 2, limit)
    t = placed_like(outer(x, x) + noise, q)
    limit = _limit(side.limit, _norm(t) + goal)
    identity = identity_like(t)
    change = identity - rate / (2 * limit) * (t - goal * identity)
    q = times(times(change, q), change)
    return _Side((q + q.mT) / 2, limit)


def _limit(old: Array, size: Array) -> Array:
    """A running bound of a step's size, that no step exceeds."""
    return jnp.maximum(0.9 * old + 0.1 * size, size)


def _norm(t: Float[Array, "*b m m"]) -> Float[Array, "*b 1 1"]:
    """About the largest eigenvalue, never above it: a few power steps.

    They start at the largest column, and the diagonal is a bound too.
    """
    sizes = jnp.sum(t**2, axis=-2, keepdims=True)
    start = sizes == jnp.max(sizes, axis=-1, keepdims=True)
    vector = placed_like(jnp.where(start, 1.0, 0.0).astype(t.dtype), sizes).mT
    length = lambda v: jnp.sqrt(jnp.sum(v**2, axis=(-2, -1), keepdims=True))
    for _ in range(4):
        vector = times(t, vector / nonzero(length(vector)))
    diagonal = jnp.max(t * identity_like(t), axis=(-2, -1), keepdims=True)
    return jnp.maximum(length(vector), diagonal)


def _balanced(left: _Side, right: _Side) -> tuple[_Side, _Side]:
    """The same product of factors, with largest entries of one size."""
    top = lambda side: nonzero(jnp.max(jnp.abs(side.root), axis=(-2, -1), keepdims=True))
    ratio = jnp.sqrt(top(right) / top(left))
    return _Side(left.root * ratio, left.limit), _Side(right.root / ratio, right.limit)
