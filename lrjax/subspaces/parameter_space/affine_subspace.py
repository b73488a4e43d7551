from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree


class Columns(NamedTuple):
    """``P (D, dim)`` itself."""

    columns: Float[Array, "size dim"]

    def __call__(self, x: Array, size: int) -> Array:
        """``P x``."""
        del size
        return jnp.matmul(self.columns, x, precision=lax.Precision.HIGHEST)


class AffineSubspace(eqx.Module):
    """A function from a few numbers to all parameters of a model: ``x ↦ θ_0 + P x``.

    What :func:`random_subspace` and :func:`trajectory_subspace` make: call it with ``dim``
    numbers. A pytree of arrays: hand it to jitted functions as an argument. A batch of
    subspaces, one for each seed, is made by ``vmap``.

    Attributes:
        start: the parameters at zero, θ_0.
        projection: the numbers that make P.
        dim: how many numbers are trained.
    """

    start: PyTree
    projection: PyTree
    dim: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, " dim"]) -> PyTree:
        """The parameters ``θ_0 + P x``, in the dtypes of θ_0."""
        numbers, rest = eqx.partition(self.start, eqx.is_inexact_array)
        add = lambda leaf, move: (leaf.astype(move.dtype) + move).astype(leaf.dtype)
        return eqx.combine(jax.tree.map(add, numbers, self.lift(x)), rest)

    def lift(self, x: Float[Array, " dim"]) -> PyTree:
        """The move ``P x``: a tree like θ_0, with None for what does not move."""
        if jnp.shape(x) != (self.dim,):
            raise ValueError(
                f"This subspace takes {self.dim} numbers, got shape {jnp.shape(x)}."
            )
        leaves, treedef = jax.tree.flatten(eqx.filter(self.start, eqx.is_inexact_array))
        moves = self.projection(x, sum(leaf.size for leaf in leaves))
        parts, begin = [], 0
        for leaf in leaves:
            parts.append(moves[begin : begin + leaf.size].reshape(leaf.shape))
            begin += leaf.size
        return treedef.unflatten(parts)
