from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._matrices import Where, choose, map_init, map_matrices
from ...._sharding import placed_like
from ....linalg import increment, nonzero, outer, working_dtype
from ....subspaces import Periodic, ScheduleContext
from .rotate_updates import Rotation, _from_basis, _move, _reordered, _start, _to_basis


class KroneckerFactor(NamedTuple):
    """One side of the covariance of the gradients, trees like the parameters.

    Leaves that are not chosen hold ``optax.MaskedNode()``, as do the first two where the
    side is long.

    Attributes:
        gram: the factor, ``(*b, m, m)``.
        basis: its eigenvectors, up to a few power steps.
        values: its eigenvalues ``(*b, m, 1)``; zero until there was a usable gradient.
    """

    gram: PyTree
    basis: PyTree
    values: PyTree


class ScaleByKLShampooState(NamedTuple):
    """The state of :func:`scale_by_kl_shampoo`.

    Attributes:
        count: the number of steps.
        left: the factor of the rows.
        right: that of the columns.
        numerator: the state of the transform of the numerator.
    """

    count: Int[Array, ""]
    left: KroneckerFactor
    right: KroneckerFactor
    numerator: Any


@checks_trees
def scale_by_kl_shampoo(
    b2: ArrayLike = 0.98,
    eps: ArrayLike = 1e-8,
    *,
    numerator: optax.GradientTransformation | None = None,
    refresh_every: int | Array = 10,
    max_side: int = 10000,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide by the root of a Kronecker product, the covariance nearest in KL divergence.

    The gradients ``G (m, n)`` are seen as Gaussian with covariance ``L ⊗ R``. With
    eigenvectors ``Q_l``, ``Q_r`` and eigenvalues ``λ``, ``μ`` of the factors a step is, in
    this order, ``C = Q_lᵀ G Q_r``::

        U = Q_l [ (Q_lᵀ N Q_r)_ij / (√(λ_i μ_j) + ε) ] Q_rᵀ
        L ← b2 L + (1−b2) G R⁻¹ Gᵀ / n         R⁻¹ = Q_r diag(1/μ) Q_rᵀ
        λ_i ← b2 λ_i + (1−b2) mean_j C_ij²/μ_j
        every k steps:  Q_l ← orth(L Q_l)

    and ``R``, ``μ``, ``Q_r`` likewise from the old ``λ`` and ``Q_l``. Each factor counts
    what the other one has whitened, so that none needs the second moment of every entry.
    ``N`` is what ``numerator`` makes of the same gradient: momentum for example.

    The first gradient gives the first bases, by an eigendecomposition, and no update; all
    ``λ`` and ``μ`` start as its root mean square. They are kept above ``c⁻²`` of their
    largest, ``c = max(10, min(m, 4000))``. At a refresh columns are put in falling order of
    ``diag(Qᵀ L Q)`` first. Leaves take turns with their refreshes. The state holds
    ``2 m² + 2 n²`` numbers a matrix.

    Args:
        b2: decay of the factors and of their eigenvalues.
        eps: ``ε``, in units of the gradient.
        numerator: a transform; the gradient itself by default.
        refresh_every: ``k``.
        max_side: sides longer than this keep the identity as their basis.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat; leading axes are a stack of matrices. By default matrices but
            embeddings and heads. The others are what ``numerator`` makes of them.

    Returns:
        The transform. Under ``vmap`` the members share the branch that refreshes.

    Raises:
        ValueError: for ``refresh_every`` below one; at ``init``, if ``where`` chooses no
            leaf, or one that is no matrix.
        TypeError: for complex leaves.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_kl_shampoo(max_side=0, where=lambda path, shape: True)
        >>> g = jnp.array([[2.0, -4.0], [1.0, 2.0]])
        >>> state, step = tx.init(g), jax.jit(tx.update)
        >>> for _ in range(400):
        ...     updates, state = step(g, state)
        >>> print(updates.round(2))
        [[ 1. -1.]
         [ 1.  1.]]

    Reference:
        W. Lin, S. C. Lowe, F. Dangel, R. Eschenhagen, Z. Xu, R. B. Grosse, "Understanding
        and Improving Shampoo and SOAP via Kullback-Leibler Minimization" (2025), arXiv
        2509.03378. Special case: without bases (``max_side=0``) a second moment of rank
        one.
    """
    schedule = Periodic(refresh_every)
    top = optax.with_extra_args_support(
        optax.identity() if numerator is None else numerator
    )

    def init(params):
        def start(leaf, x):
            a = jnp.zeros_like(leaf.view(x), working_dtype(x.dtype))
            return (*_first(a, max_side), *_first(a.mT, max_side))

        trees = map_init("scale_by_kl_shampoo", where, start, params, 6)
        left, right = KroneckerFactor(*trees[:3]), KroneckerFactor(*trees[3:])
        return ScaleByKLShampooState(
            jnp.zeros((), jnp.int32), left, right, top.init(params)
        )

    def update(updates, state, params=None, **extra):
        leaves, gradients, treedef = choose("scale_by_kl_shampoo", updates, where)
        places = sum(leaf is not None for leaf in leaves)
        steps, top_state = top.update(updates, state.numerator, params, **extra)

        def one(leaf, step, g, *own):
            left, right = KroneckerFactor(*own[:3]), KroneckerFactor(*own[3:])
            a, n = (leaf.view(x).astype(left.values.dtype) for x in (g, step))
            due = schedule.due((), ScheduleContext(state.count, leaf.index, places))
            u = leaf.restore(_whitened(n, left, right, eps), step).astype(step.dtype)
            left, right = _fitted(a, left, right, b2, state.count == 0, due)
            return (u, None, *left, *right)

        gradients = treedef.unflatten(gradients)
        own = (*state.left, *state.right)
        out, _, *new = map_matrices(
            "scale_by_kl_shampoo", where, one, steps, gradients, *own
        )
        left, right = KroneckerFactor(*new[:3]), KroneckerFactor(*new[3:])
        count = increment(state.count)
        return out, ScaleByKLShampooState(count, left, right, top_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _first(a: Float[Array, "*b m n"], max_side: int) -> KroneckerFactor:
    values = jnp.sum(a, axis=-1, keepdims=True)  # of zeros, and sharded as they are
    if a.shape[-2] > max_side:
        return KroneckerFactor(optax.MaskedNode(), optax.MaskedNode(), values)
    return KroneckerFactor(*_start(a), values)


def _rotation(side: KroneckerFactor) -> Rotation | None:
    """The bases as :func:`rotate_updates` has them; None for the identity."""
    masked = isinstance(side.basis, optax.MaskedNode)
    return None if masked else Rotation(side.gram, side.basis)


def _whitened(n: Array, left: KroneckerFactor, right: KroneckerFactor, eps) -> Array:
    sides = _rotation(left), _rotation(right)
    size = jnp.sqrt(left.values) * jnp.sqrt(right.values.mT)
    turned = _to_basis(n, *sides)
    scaled = jnp.where(size > 0, turned / (nonzero(size) + eps), 0)
    return _from_basis(scaled, *sides)


def _fitted(
    a: Float[Array, "*b m n"],
    left: KroneckerFactor,
    right: KroneckerFactor,
    b2: ArrayLike,
    first: Bool[Array, ""],
    due: Bool[Array, ""],
) -> tuple[KroneckerFactor, KroneckerFactor]:
    """Both factors after a gradient, and in new bases where it is their turn."""
    a = lax.stop_gradient(a)
    size = jnp.mean(a**2, axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(size) & (size > 0)
    a = jnp.where(usable, a, 0)
    fresh = usable & (jnp.max(left.values, axis=(-2, -1), keepdims=True) == 0)
    left, right = (
        x._replace(values=jnp.where(fresh, jnp.sqrt(size), x.values)) for x in (left, right)
    )

    def average(old, new, take=usable):
        new = b2 * old + (1 - b2) * placed_like(new, old)
        return jnp.where(take, new, old).astype(old.dtype)

    def one(a, own: KroneckerFactor, other: KroneckerFactor) -> KroneckerFactor:
        """The side of the rows: what the other side has whitened."""
        white = _to_basis(a, None, _rotation(other)) / nonzero(jnp.sqrt(other.values.mT))
        basis = _rotation(own)
        turned = white if basis is None else _to_basis(white, basis, None)
        seen = jnp.mean(turned**2, axis=-1, keepdims=True)
        values = _bounded(average(own.values, seen, usable & ~fresh))
        if basis is None:
            return own._replace(values=values)
        gram = average(own.gram, outer(white, white) / a.shape[-1])
        return own._replace(gram=gram, values=values)

    new = one(a, left, right), one(a.mT, right, left)
    move = lambda: tuple(_turned(x, first, first | due) for x in new)
    left, right = lax.cond(any_member(first | due), move, lambda: new)
    return left, right


def _bounded(values: Float[Array, "*b m 1"]) -> Float[Array, "*b m 1"]:
    """Eigenvalues that are no smaller than a part of the largest one."""
    limit = max(10, min(values.shape[-2], 4000))
    return jnp.maximum(values, jnp.max(values, axis=-2, keepdims=True) / limit**2)


def _turned(side: KroneckerFactor, first, take) -> KroneckerFactor:
    """One power step of the basis, its eigenvalues in the order of its columns."""
    basis = _rotation(side)
    if basis is None:
        return side
    moved = cast(tuple[Rotation, Array, Array], _move(basis, first, take))
    (gram, vectors), _, order = moved
    values = _reordered(side.values, jnp.expand_dims(order, -1), axis=-2)
    return KroneckerFactor(gram, vectors, values)
