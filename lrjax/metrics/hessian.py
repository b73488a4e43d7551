from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from .._arguments import check_key
from .._sharding import einsum


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
    check_key("hessian_overlap", key)
    flat, unravel = ravel_pytree(params)
    if not k <= steps <= flat.size:
        raise ValueError(
            f"hessian_overlap needs k <= steps <= the number of parameters, got k={k}, "
            f"steps={steps}, {flat.size} parameters."
        )
    gradient = jax.grad(lambda x: loss(unravel(x), *args))
    product = lambda v: jax.jvp(gradient, (flat,), (v,))[1]
    basis, diagonal, side = _lanczos(product, flat, steps, key)
    small = jnp.diag(diagonal) + jnp.diag(side[:-1], 1) + jnp.diag(side[:-1], -1)
    values, vectors = jnp.linalg.eigh(small)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    g = gradient(flat)
    inside = einsum("sk,sn,n->k", vectors, basis, g)
    residual = jnp.abs(side[-1] * vectors[-1, -1]) / jnp.max(jnp.abs(values))
    return HessianOverlap(values, jnp.sum(inside**2) / jnp.sum(g**2), residual)


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
