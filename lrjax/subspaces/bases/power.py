from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..._sharding import einsum
from ...linalg import orthonormalize
from ...linalg.orthonormalize import CHOLESKY_SHIFTS, cholesky_pass
from ..view import Rank, Side
from .basis import Basis


def power(
    rank: Rank,
    *,
    blocks: int = 1,
    steps: int = 1,
    blend: ArrayLike | None = None,
    start: Basis | None = None,
    method: Literal["cholesky", "qr"] = "cholesky",
    side: Side = "short",
) -> Basis:
    """The dominant subspace tracked by warm power steps: matmuls only, no SVD.

    ``P ← orth(a (aᵀ P) + sP)``, with a shift ``s`` of rounding size that keeps the
    columns independent where the gradient has lower rank. From a random start one step
    finds nearly all of the energy that the SVD would, and on a constant gradient the
    span converges to that of the leading singular vectors.

    With ``blocks = k > 1`` a step turns only the ``r/k`` columns whose turn it is,
    projected off the others, so that the cost of a refresh is spread evenly over ``k``
    steps: no step is slower than another. The energy ``‖Pᵀa‖²`` of a constant gradient
    never falls, and the limit is the same.

    Args:
        rank: see :class:`Basis`.
        blocks: over how many steps one sweep through the columns is spread.
        steps: power steps of one refresh.
        blend: weight ``ρ`` of the momentum. The power step is then taken with
            ``b = ρ P m̂ + (1−ρ) a``, ``m̂ = m/(1−ρᵗ)`` the bias-corrected first moment.
        start: rule for the first basis; by default a power step from random columns.
        method: how to orthonormalize; ``"cholesky"`` keeps sharded rows in place.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Raises:
        ValueError: if ``blocks`` or ``steps`` is below one.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.power(0.25, blocks=8)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam" (2024), arXiv
        2410.16103, for the blend.
    """
    if blocks < 1 or steps < 1:
        raise ValueError(f"power needs blocks >= 1 and steps >= 1, got {blocks}, {steps}.")

    def target(p, a, to):
        if blend is None or to.momentum is None:
            return a
        corrected = to.momentum / jnp.maximum(1 - blend**to.count, 1e-12)
        old = einsum("...pr,...rq->...pq", p, corrected.astype(p.dtype))
        return jnp.where(to.count > 0, blend * old + (1 - blend) * a, a)

    def whole(p, a, to):
        b = target(p, a, to)
        for step in range(steps):
            r = to.projected if step == 0 and reuses else None
            p = orthonormalize(_image(b, p, r, to.rows), method=method)
        return p

    def one_block(p, a, to):
        first, size = moved(to.count, to.rank)
        b = target(p, a, to)
        for step in range(steps):
            r = to.projected if step == 0 and reuses else None
            p = _turn_block(b, p, r, to.rows, first, size, method)
        return p

    # Where the loop hands Pᵀa over, one of the two products is done.
    reuses = blend is None

    def moved(count, rank):
        size = -(-rank // blocks)
        return jnp.minimum(count % blocks * size, rank - size), size

    first = whole if start is None else start.refresh
    if blocks == 1:
        return Basis(rank, side, whole, start=None if start is None else first)
    return Basis(rank, side, one_block, start=first, moved=moved)


def _image(a: Array, p: Array, projected: Array | None, rows: bool) -> Array:
    """``a aᵀ p + s p``: the shift keeps null directions where they are."""
    if projected is None:
        projected = einsum("...pr,...pq->...rq", p, a)
    if rows:
        image = einsum("...pq,...rq->...pr", a, projected)
    else:
        # The thin factor first; without the barrier XLA turns the product round again.
        image = lax.optimization_barrier(einsum("...rq,...pq->...rp", projected, a)).mT
    largest = jnp.max(jnp.abs(image), axis=(-2, -1), keepdims=True)
    # The columns of what is left are no longer than the root of their length.
    shift = 8 * jnp.finfo(image.dtype).eps * image.shape[-2] ** 0.5
    return image / jnp.where(largest > 0, largest, 1) + shift * p


def _turn_block(
    a: Float[Array, "*b p q"],
    p: Float[Array, "*b p r"],
    projected: Float[Array, "*b r q"] | None,
    rows: bool,
    first: Array,
    size: int,
    method,
) -> Float[Array, "*b p r"]:
    """A power step of some columns, within the complement of the others."""
    columns = lax.broadcasted_iota(
        jnp.int32, (1,) * (p.ndim - 1) + p.shape[-1:], p.ndim - 1
    )
    others = jnp.where((columns < first) | (columns >= first + size), p, 0)
    block = lax.dynamic_slice_in_dim(p, first, size, axis=-1)
    if projected is not None:
        projected = lax.dynamic_slice_in_dim(projected, first, size, axis=-2)
    block = _image(a, block, projected, rows)

    def off_others(block):
        # The thin factor first: XLA on CPU is several times slower the other way round.
        inside = einsum("...ps,...pr->...sr", block, others)
        return block - einsum("...pr,...sr->...ps", others, inside)

    # Twice is enough for the projection: the first one leaves rounding errors of the size
    # of what it removed, the second those of what remains. Cholesky QR needs three passes,
    # which take turns with it.
    if method == "cholesky":
        shifts = jnp.array(CHOLESKY_SHIFTS, block.dtype)
        one_round = lambda k, x: cholesky_pass(off_others(x), shifts[k])
        block = lax.fori_loop(0, len(CHOLESKY_SHIFTS), one_round, block)
    else:
        again = lambda _, x: orthonormalize(off_others(x), method=method)
        block = lax.fori_loop(0, 2, again, block)
    return lax.dynamic_update_slice_in_dim(p, block, first, axis=-1)
