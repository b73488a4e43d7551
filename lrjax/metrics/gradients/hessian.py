from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from ..._arguments import check_key
from ..._sharding import einsum
from ...linalg import nonzero, subspace_overlap


class HessianOverlap(NamedTuple):
    """The largest eigenvalues of a Hessian and where the gradient lies among them.

    Attributes:
        values: the ``k`` largest eigenvalues, descending.
        overlap: ``‖P_k g‖² / ‖g‖²``, the part of the gradient in their eigenspace.
        residual: ``‖H v_k − λ_k v_k‖ / λ_1``, the error of the last eigenpair.
    """

    values: Float[Array, " k"]
    overlap: Float[Array, ""]
    residual: Float[Array, ""]


class HessianSpace(NamedTuple):
    """The eigenvectors of the largest eigenvalues of a Hessian, as trees.

    It is a basis for :func:`lrjax.project_out`, which then trains in the bulk: all but
    these directions.

    Attributes:
        values: the ``k`` largest eigenvalues, descending.
        vectors: orthonormal eigenvectors ``v_i``, a tree like the parameters with a leading
            axis of k.
        residuals: ``‖H v_i − λ_i v_i‖ / λ_1`` of each.
    """

    values: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]

    def project(self, tree: PyTree) -> PyTree:
        """The part ``Σ_i v_i ⟨v_i, g⟩`` of a tree like the parameters in the space."""
        inside = self._coefficients(tree)
        put = lambda v, x: jnp.tensordot(inside, v, 1, precision="highest").astype(x.dtype)
        return jax.tree.map(put, self.vectors, tree)

    def project_out(self, tree: PyTree) -> PyTree:
        """The part outside, ``g − Σ_i v_i ⟨v_i, g⟩``."""
        return jax.tree.map(lambda x, y: x - y, tree, self.project(tree))

    def share(self, tree: PyTree) -> Float[Array, ""]:
        """How much of a tree lies inside: ``Σ_i ⟨v_i, g⟩² / ‖g‖²``; zero of zeros."""
        total = sum(
            jnp.sum(x.astype(self.values.dtype) ** 2) for x in jax.tree.leaves(tree)
        )
        return jnp.sum(self._coefficients(tree) ** 2) / nonzero(jnp.asarray(total))

    def overlap(self, other: "HessianSpace") -> Float[Array, ""]:
        """``‖V Wᵀ‖²_F / min(k, k')`` with another space, in [0, 1].

        As :func:`lrjax.linalg.subspace_overlap`; two random ones have ``max(k, k') / n``.
        """
        ravel = jax.vmap(lambda tree: ravel_pytree(tree)[0])
        return subspace_overlap(ravel(self.vectors).T, ravel(other.vectors).T)

    def _coefficients(self, tree: PyTree) -> Float[Array, " k"]:
        dot = lambda v, x: jnp.tensordot(
            v, x.astype(v.dtype), jnp.ndim(x), precision="highest"
        )
        return sum(jax.tree.leaves(jax.tree.map(dot, self.vectors, tree)), jnp.zeros(()))


def hessian_space(
    loss: Callable[..., Scalar],
    params: PyTree,
    *args: Any,
    k: int,
    key: PRNGKeyArray,
    steps: int = 40,
) -> HessianSpace:
    """The top eigenspace of a Hessian: what most of the gradient of a classifier lies in.

    Lanczos as in :func:`hessian_overlap`, and the Ritz vectors ``(k, parameters)`` as
    trees. Training in this space alone stalls, and in its complement does not::

        grads = space.project(grads)       # dominant
        grads = space.project_out(grads)   # bulk, as lrjax.project_out(space) does

    Args:
        loss: ``loss(params, *args)``.
        params: a tree of floating arrays of one dtype.
        *args: data.
        k: how many of the largest eigenvalues span the space; for a classifier the
            number of classes.
        key: for the random start.
        steps: Lanczos iterations, between ``k`` and the number of parameters. Look at
            ``residuals`` to see whether they were enough.

    Returns:
        A :class:`HessianSpace`.

    Raises:
        ValueError: if ``k > steps`` or ``steps`` exceeds the number of parameters.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([9.0, 4.0, 1.0]) * x**2)
        >>> x = jnp.array([1.0, 1.0, 1.0])
        >>> key = jax.random.key(0)
        >>> space = lrjax.metrics.hessian_space(loss, x, k=1, key=key, steps=3)
        >>> print(space.project_out(jax.grad(loss)(x)).round(3) + 0.0)
        [0. 4. 1.]

    Reference:
        M. Song, K. Ahn, C. Yun, "Does SGD really happen in tiny subspaces?" (2024), arXiv
        2405.16002; G. Gur-Ari, D. Roberts, E. Dyer, "Gradient descent happens in a tiny
        subspace" (2018), arXiv 1812.04754.
    """
    _, unravel, top = _top("hessian_space", loss, params, args, k, key, steps)
    vectors = einsum("sk,sn->kn", top.vectors, top.basis)
    return HessianSpace(top.values, jax.vmap(unravel)(vectors), top.residuals)


def hessian_overlap(
    loss: Callable[..., Scalar],
    params: PyTree,
    *args: Any,
    k: int,
    key: PRNGKeyArray,
    steps: int = 40,
) -> HessianOverlap:
    """How much of the gradient lies in the top eigenspace of the Hessian.

    Lanczos with full reorthogonalization on Hessian-vector products: the Hessian is
    never formed. Memory for ``steps`` copies of the parameters.

    Args:
        loss: ``loss(params, *args)``.
        params: a tree of floating arrays of one dtype.
        *args: data.
        k: how many of the largest eigenvalues span the space; for a classifier the
            number of classes.
        key: for the random start.
        steps: Lanczos iterations, between ``k`` and the number of parameters. Look at
            ``residual`` to see whether they were enough.

    Returns:
        A :class:`HessianOverlap`.

    Raises:
        ValueError: if ``k > steps`` or ``steps`` exceeds the number of parameters.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([9.0, 4.0, 1.0]) * x**2)
        >>> x = jnp.array([1.0, 1.0, 1.0])
        >>> key = jax.random.key(0)
        >>> found = lrjax.metrics.hessian_overlap(loss, x, k=1, key=key, steps=3)
        >>> print(found.values.round(3), found.overlap.round(4))  # 81 / (81 + 16 + 1)
        [9.] 0.8265

    Reference:
        G. Gur-Ari, D. Roberts, E. Dyer, "Gradient descent happens in a tiny subspace"
        (2018), arXiv 1812.04754. That the rest of the gradient matters nevertheless:
        M. Song, K. Ahn, C. Yun, "Does SGD really happen in tiny subspaces?" (2024), arXiv
        2405.16002.
    """
    gradient, _, top = _top("hessian_overlap", loss, params, args, k, key, steps)
    inside = einsum("sk,sn,n->k", top.vectors, top.basis, gradient)
    overlap = jnp.sum(inside**2) / jnp.sum(gradient**2)
    return HessianOverlap(top.values, overlap, top.residuals[-1])


class _Top(NamedTuple):
    """The largest Ritz values, their vectors in the Lanczos basis, and that as rows."""

    values: Float[Array, " k"]
    vectors: Float[Array, "s k"]
    basis: Float[Array, "s n"]
    residuals: Float[Array, " k"]


def _top(
    owner: str,
    loss: Callable[..., Scalar],
    params: PyTree,
    args: tuple,
    k: int,
    key: PRNGKeyArray,
    steps: int,
) -> tuple[Array, Callable[[Array], PyTree], _Top]:
    """The flat gradient, the way back to a tree, and the top of the Hessian."""
    check_key(owner, key)
    flat, unravel = ravel_pytree(params)
    if not k <= steps <= flat.size:
        raise ValueError(
            f"{owner} needs k <= steps <= the number of parameters, got k={k}, "
            f"steps={steps}, {flat.size} parameters."
        )
    gradient = jax.grad(lambda x: loss(unravel(x), *args))
    product = lambda v: jax.jvp(gradient, (flat,), (v,))[1]
    basis, diagonal, side = _lanczos(product, flat, steps, key)
    small = jnp.diag(diagonal) + jnp.diag(side[:-1], 1) + jnp.diag(side[:-1], -1)
    values, vectors = jnp.linalg.eigh(small)
    residuals = jnp.abs(side[-1] * vectors[-1]) / jnp.max(jnp.abs(values))
    first = lambda x: x[..., ::-1][..., :k]
    top = _Top(first(values), first(vectors), basis, first(residuals))
    return gradient(flat), unravel, top


def _lanczos(product: Callable[[Array], Array], like: Array, steps: int, key: PRNGKeyArray):
    """The basis as rows, and the diagonal and the side diagonal of the projection."""
    draw = lambda i: jr.normal(jr.fold_in(key, i), like.shape, like.dtype)

    def off(basis, w):
        for _ in range(2):  # the second pass removes what rounding left in the first
            w = w - einsum("sn,s->n", basis, einsum("sn,n->s", basis, w))
        return w

    def step(carry, i):
        basis, v = carry
        basis = basis.at[i].set(v)
        image = product(v)
        w = off(basis, image)
        side = jnp.linalg.norm(w)
        # Clustered eigenvalues exhaust the Krylov space: what is left of the image is
        # rounding, and may lie in the basis. Go on in a direction that does not.
        rounding = 10 * jnp.finfo(w.dtype).eps * jnp.linalg.norm(image)
        exhausted = side <= rounding
        w = jnp.where(exhausted, off(basis, draw(i + 1)), w)
        side = jnp.where(exhausted, 0, side)
        return (basis, w / jnp.linalg.norm(w)), (jnp.vdot(v, image), side)

    empty = jnp.zeros((steps, *like.shape), like.dtype)
    start = draw(0)
    carry = (empty, start / jnp.linalg.norm(start))
    (basis, _), (diagonal, side) = lax.scan(step, carry, jnp.arange(steps))
    return basis, diagonal, side
