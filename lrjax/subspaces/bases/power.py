import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._matrices import Rank, Side
from ..._sharding import placed_like
from ...linalg import cross, nonzero, orthonormalize, outer, times
from .basis import Basis, MatrixBasis, RefreshContext


class Power(MatrixBasis):
    """The dominant subspace tracked by warm power steps: matmuls only, no SVD.

    ``P ← orth(a (aᵀ P) + sP)``, with a shift ``s`` of rounding size that keeps the
    columns independent where the gradient has lower rank. From a random start one step
    finds nearly all of the energy that the SVD would, and on a constant gradient the
    span converges to that of the leading singular vectors.

    With ``blocks = k > 1`` a step turns only the ``r/k`` columns whose turn it is,
    projected off the others, so that the cost of a refresh is spread evenly over ``k``
    steps: no step is slower than another, the first one included. The energy ``‖Pᵀa‖²``
    of a constant gradient never falls, and the limit is the same.

    Args:
        rank: see :class:`Basis`.
        blocks: over how many steps one sweep through the columns is spread.
        steps: power steps of one refresh.
        blend: weight ``ρ`` of the momentum. The power step is then taken with
            ``b = ρ P m̂ + (1−ρ) a``, ``m̂ = m/(1−ρᵗ)`` the bias-corrected first moment.
        first: rule for the first basis; by default the random one that every leaf starts
            with is turned like any other.
        method: how to orthonormalize; ``"cholesky"`` keeps sharded rows in place.
        side: see :class:`Basis`.

    Raises:
        ValueError: if ``blocks`` or ``steps`` is below one.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.Power(0.25, blocks=8)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam: adaptive
        optimization from low-dimensional gradient statistics" (2024), arXiv 2410.16103,
        for the blend.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    blocks: int = 1
    steps: int = 1
    blend: ArrayLike | None = None
    first: Basis | None = None
    method: Literal["cholesky", "qr"] = "cholesky"
    side: Side = "short"

    def __check_init__(self):
        if self.blocks < 1 or self.steps < 1:
            raise ValueError(
                f"Power needs blocks >= 1 and steps >= 1, got {self.blocks}, {self.steps}."
            )

    @property
    def uses_momentum(self) -> bool:
        """If the momentum is blended in."""
        return self.blend is not None

    @property
    def in_place(self) -> bool:
        """Unless the momentum is blended in, or another rule sets the first basis."""
        return self.blend is None and self.first is None

    @property
    def has_start(self) -> bool:
        """If a rule for the first basis is given."""
        return self.first is not None

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> Array:
        """Random orthonormal columns, the same for every member of a stack."""
        return random_columns(shape, rank, dtype, key)

    def start(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """The basis of the rule for the first one."""
        rule = self if self.first is None else self.first
        return rule.refresh(state, a, context)

    def changed_columns(self, count: Array, rank: int) -> tuple[Array, int] | None:
        """The block whose turn it is; the last one overlaps where they do not come out."""
        if self.blocks == 1:
            return None
        size = -(-rank // self.blocks)
        return jnp.minimum(count % self.blocks * size, rank - size), size

    def refresh(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """Turn all columns, or those whose turn it is."""
        b = self._target(state, a, context)
        # Where the loop hands Pᵀa over, one of the two products of a step is done.
        projected = context.projected if self.blend is None else None
        p = state
        for step in range(self.steps):
            p = self._step(p, b, projected if step == 0 else None, context)
        return p

    def _target(self, p: Array, a: Array, context: RefreshContext) -> Array:
        if self.blend is None or context.momentum is None:
            return a
        filled = jnp.maximum(1 - self.blend**context.count, 1e-12)
        old = times(p, (context.momentum / filled).astype(p.dtype), precision=None)
        return jnp.where(context.count > 0, self.blend * old + (1 - self.blend) * a, a)

    def _step(
        self, p: Array, b: Array, projected: Array | None, context: RefreshContext
    ) -> Array:
        turned = self.changed_columns(context.count, context.rank)
        if turned is None:
            return orthonormalize(
                _image(b, p, projected, context.on_rows), method=self.method
            )
        first, size = turned
        place = jnp.arange(p.shape[-1])[(None,) * (p.ndim - 1)]
        others = jnp.where((place < first) | (place >= first + size), p, 0)
        block = lax.dynamic_slice_in_dim(p, first, size, axis=-1)
        if projected is not None:
            projected = lax.dynamic_slice_in_dim(projected, first, size, axis=-2)
        block = _image(b, block, projected, context.on_rows)
        block = orthonormalize(block, method=self.method, against=others, precision=None)
        return lax.dynamic_update_slice_in_dim(p, block, first, axis=-1)


def random_columns(
    shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
) -> Float[Array, "*b p r"]:
    """A random orthonormal basis, the same for every member of a stack."""
    columns = orthonormalize(jr.normal(key, (shape[-2], rank), dtype))
    return jnp.broadcast_to(columns, (*shape[:-2], *columns.shape))


def _image(a: Array, p: Array, projected: Array | None, on_rows: bool) -> Array:
    """``a aᵀ p + s p``: the shift keeps null directions where they are."""
    if projected is None:
        projected = cross(p, a, precision=None)
    if on_rows:
        image = outer(a, projected, precision=None)
    else:
        # The thin factor first; without the barrier XLA turns the product round again.
        image = outer(projected, a, precision=None)
        image = lax.optimization_barrier(image).mT
    image = placed_like(image, p)
    largest = jnp.max(jnp.abs(image), axis=(-2, -1), keepdims=True)
    # The columns of what is left are no longer than the root of their length.
    shift = 8 * jnp.finfo(image.dtype).eps * image.shape[-2] ** 0.5
    return image / nonzero(largest) + shift * p
