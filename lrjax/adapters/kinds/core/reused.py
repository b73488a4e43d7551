from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ...._sites import Site
from ....linalg import orthonormalize, truncated_svd
from ....lowrank import LowRank
from ...protocol import Adapters
from .adapter import CoreKind


class EigenLoRAx(CoreKind):
    """EigenLoRAx: a new adapter out of the principal directions of older ones.

    ``W' = W + s · C_B (l_B l_Aᵀ) C_Aᵀ``. The columns of ``C_B (out, k)`` are the leading
    principal components of the left factors of the given adapters at the same path, their
    mean taken off, beside random directions orthogonal to them; ``C_A (in, k)`` the same of
    the right factors. Both are frozen. The loadings ``l_B (k, r)`` and ``l_A (k, r)`` are
    trained: ``2 k r`` numbers a matrix, ``k = components + random``. The components are
    multiplied into the loadings once a bind.

    Args:
        adapters: older adapters of this model, whose change is a product.
        rank: the width of the loadings.
        alpha: the numerator of ``s = alpha / rank``, ``rank`` by default.
        components: how many principal components.
        random: how many random directions.
        spread: the loadings of the left start uniform in ``±spread``; 0 is the model
            itself. Those of the right start in ``±1/2``.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for no adapters, a rank below 1, a dropout outside [0, 1); in
            :func:`lrjax.adapt`, where an older adapter is missing or is no product, or for
            more directions than there are.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> old = [lrjax.adapt(model, lrjax.LoRA(2), key=jax.random.key(i)) for i in (1, 2)]
        >>> kind = lrjax.adapters.EigenLoRAx(old, rank=1, components=2, random=1)
        >>> lrjax.adapt(model, kind, key=jax.random.key(3))[""].core.shape
        (3, 3)

    Reference:
        P. Kaushik et al., "EigenLoRAx: recycling adapters to find principal subspaces for
        resource-efficient adaptation and inference" (2025), arXiv:2502.04700.
    """

    adapters: tuple[Adapters, ...]
    components: int = eqx.field(static=True)
    random: int = eqx.field(static=True)
    spread: ArrayLike

    def __init__(
        self,
        adapters: Iterable[Adapters],
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        components: int = 32,
        random: int = 32,
        spread: ArrayLike = 0.5,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, alpha, dropout, dtype)
        self.adapters, self.spread = tuple(adapters), spread
        self.components, self.random = components, random
        if not self.adapters or components < 0 or random < 0 or components + random < 1:
            raise ValueError(
                "EigenLoRAx needs at least one older adapter and one direction, got "
                f"{len(self.adapters)} adapters, components={components} and "
                f"random={random}."
            )

    def init(self, site, *, key, pool=None, data=None):
        """The directions, and random loadings."""
        dtype, size = self.dtype_of(site), self.components + self.random
        pairs = [_pair_at(site, old) for old in self.adapters]
        k_left, k_right, k_bases = jr.split(key, 3)
        sides = ([p.left for p in pairs], [p.right for p in pairs])
        bases = (
            self._basis(site, jnp.concatenate(side, axis=1), k).astype(dtype)
            for side, k in zip(sides, jr.split(k_bases), strict=True)
        )
        uniform = lambda k: jr.uniform(k, (size, self.rank), dtype, -1, 1)
        left = jnp.asarray(self.spread, dtype) * uniform(k_left)
        return self.adapter(LowRank(*bases), LowRank(left, uniform(k_right) / 2))

    def _basis(
        self, site: Site, columns: Float[Array, "n m"], key: PRNGKeyArray
    ) -> Float[Array, "n k"]:
        """Principal components of the columns, and random directions beside them."""
        most = min(columns.shape)
        if self.components > most or self.components + self.random > len(columns):
            raise ValueError(
                f"EigenLoRAx was asked for {self.components} components and {self.random} "
                f"random directions at {site.path or 'the root'}: the older adapters have "
                f"{columns.shape[1]} columns there, of length {len(columns)}."
            )
        centred = columns - jnp.mean(columns, axis=1, keepdims=True)
        random = jr.normal(key, (len(columns), self.random), columns.dtype)
        if not self.components:
            return orthonormalize(random)
        found = truncated_svd(centred, self.components).left
        if not self.random:
            return found
        return jnp.concatenate([found, orthonormalize(random, against=found)], axis=1)


def _pair_at(site: Site, old: Adapters) -> LowRank:
    """The factors that an older tree of adapters has for this one matrix."""
    if site.path not in old.layers:
        raise ValueError(
            f"EigenLoRAx has an older tree of adapters without one at "
            f"{site.path or 'the root'}: it has {sorted(old.layers)}."
        )
    own = old[site.path]
    if site.index is not None:
        own = jax.tree.map(lambda x: x[site.index], own)
    found = own.factors(old.pools.get(own.pool_name() or ""))
    if found is None or found[0].shape != site.shape:
        raise ValueError(
            f"The older adapter at {site.path or 'the root'} is a {type(own).__name__} of "
            f"shape {own.shape}, which is no product of two factors for a matrix "
            f"{site.shape}: lrjax.adapters.as_lora can make it one."
        )
    return found[0]
