from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .grouped import Block


Weigh = Callable[[Array], Array]  # weights of the squares of residuals


def contract(subscripts: str, *operands: Array) -> Array:
    """An einsum of blocks, which are local to their device."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def normal_equations(
    block: Block, start: Float[Array, "rows d"], weigh: Weigh | None
) -> tuple[Array, Array, Array, Array]:
    """``Σ w v vᵀ``, ``Σ w e v``, ``Σ w`` and ``Σ w e²`` of each row of a block.

    ``e`` are the residuals at ``start``, whose weights ``w`` are one without ``weigh``.
    """
    size, d = start.shape

    def add(sums, slab):
        e = slab.values - contract("bwr,br->bw", slab.vectors, start)
        w = slab.seen.astype(e.dtype)
        weighted = slab.vectors
        if weigh is not None:
            w = jnp.where(slab.seen, weigh(e), 0)
            weighted = w[..., None] * weighted
        new = (
            contract("bwr,bws->brs", weighted, slab.vectors),
            contract("bwr,bw->br", weighted, e),
            jnp.sum(w, axis=1),
            jnp.sum(w * e * e, axis=1),
        )
        return tuple(a + b for a, b in zip(sums, new, strict=True))

    shapes = ((size, d, d), (size, d), (size,), (size,))
    return block.fold(add, tuple(jnp.zeros(shape, start.dtype) for shape in shapes))


def weights_by_column(
    block: Block, start: Float[Array, "rows d"], weigh: Weigh | None, n: int
) -> Float[Array, "rows n"]:
    """The weights of all entries of a block, zero where there is none."""
    rows = jnp.arange(len(start))[:, None]

    def add(total, slab):
        w = slab.seen.astype(start.dtype)
        if weigh is not None:
            e = slab.values - contract("bwr,br->bw", slab.vectors, start)
            w = jnp.where(slab.seen, weigh(e), 0)
        return total.at[rows, slab.cols].add(w, mode="drop")

    return block.fold(add, jnp.zeros((len(start), n), start.dtype))


def inverse_root(a: Float[Array, "rows d d"]) -> Float[Array, "rows d d"]:
    """``W`` with ``Wᵀ W = a⁻¹`` of positive semi-definite matrices, always finite.

    Scaled to a diagonal of ones and shifted by the rounding error: so columns of very
    different sizes do no harm.
    """
    d = a.shape[-1]
    sizes = jnp.diagonal(a, axis1=1, axis2=2)
    scale = jnp.where(sizes > 0, lax.rsqrt(jnp.where(sizes > 0, sizes, 1)), 0)
    one = jnp.broadcast_to(jnp.eye(d, dtype=a.dtype)[None], a.shape)
    scaled = a * scale[:, :, None] * scale[:, None, :]
    # A direction that nothing is known of has a zero diagonal, and the inverse zero.
    scaled += jnp.where(sizes > 0, 4 * d * jnp.finfo(a.dtype).eps, 1)[:, :, None] * one
    root = lax.linalg.triangular_solve(
        lax.linalg.cholesky(scaled), one, left_side=True, lower=True
    )
    return root * scale[:, None, :]
