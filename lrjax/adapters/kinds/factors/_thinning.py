import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, UInt32

from ....lowrank import LowRank


class Thinning(eqx.Module):
    """Random zeros in several copies of a pair, which stand side by side.

    ``left rightᵀ`` becomes ``Σ_k (left ⊙ M_k)(right ⊙ N_k)ᵀ`` with masks that are drawn
    anew from a seed where they are needed, and never kept.

    Attributes:
        seed: ``(*b, 2)``, frozen.
        density: ``(*b,)``, the share of ones in a mask, frozen.
        copies: how many.
    """

    seed: UInt32[Array, "*b 2"]
    density: Float[Array, "*b"]
    copies: int = eqx.field(static=True)

    def __call__(self, pair: LowRank) -> LowRank:
        """The copies side by side: ``r · copies`` columns."""
        copies = self._of_one
        for _ in pair.left.shape[:-2]:
            copies = jax.vmap(copies)
        return copies(self.seed, self.density, pair)

    def _of_one(self, seed: Array, density: Array, pair: LowRank) -> LowRank:
        # One generator for all, so that what is saved does not hang on a user's default.
        keys = jr.split(jr.wrap_key_data(seed, impl="threefry2x32"))

        def thin(key: Array, x: Array) -> Array:
            masks = jr.bernoulli(key, density, (self.copies, *x.shape))
            copies = jnp.where(masks, x[None], 0)
            return jnp.concatenate(list(copies), axis=1)

        return LowRank(thin(keys[0], pair.left), thin(keys[1], pair.right))
