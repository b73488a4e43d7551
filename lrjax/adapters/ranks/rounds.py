from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..kinds.factors import Factors
from ..protocol import Adapters
from ._table import Table


def ablation_scores(
    score: Callable[[Adapters], Array], adapters: Adapters, *, batch_size: int | None = None
) -> dict[str, Float[Array, "*b r"]]:
    """What each rank is worth: what is lost without it, plus what it does alone.

    ``S(all) − S(all but k) + S(k alone)`` for each column k in use, in two evaluations of
    ``S``.

    Args:
        score: of adapters, the larger the better: minus the loss on a validation batch.
        adapters: with masks, all of them, as from :func:`lrjax.adapters.with_ranks`.
        batch_size: how many columns are taken out at once under ``vmap``; by default one
            after the other.

    Returns:
        ``{path: (*b, r)}``, zero for columns that are masked.

    Raises:
        ValueError: if no adapter has a mask.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, use_bias=False, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(layer, lrjax.adapters.NLS((3, 2)), key=jax.random.key(1))
        >>> two = lrjax.adapters.with_ranks(adapters, 2)
        >>> right = jnp.eye(4)[:, :3] * jnp.array([[1.0, 3.0, 9.0]])
        >>> pair = lrjax.LowRank(jnp.eye(3), right)
        >>> two = eqx.tree_at(lambda a: a.layers[""].pair, two, pair)
        >>> trace = lambda a: jnp.trace(lrjax.merge(layer, a).weight - layer.weight)
        >>> lrjax.adapters.ablation_scores(trace, two)[""].round().tolist()
        [2.0, 6.0, 0.0]

    Reference:
        Z. Liu et al., "ALoRA: allocating low-rank adaptation for fine-tuning large
        language models" (2024), arXiv:2403.16187.
    """
    table = Table("ablation_scores", adapters)
    mask = table.mask
    size = mask.size

    def both(k: Array) -> tuple[Array, Array]:
        this = (jnp.arange(size) == k).reshape(mask.shape)
        without = table.put(adapters, jnp.where(this, 0, mask))
        alone = table.put(adapters, jnp.where(this, mask, 0))
        return score(without), score(alone)

    without, alone = lax.map(both, jnp.arange(size), batch_size=batch_size)
    worth = (score(adapters) - without + alone).reshape(mask.shape)
    return table.apart(jnp.where(mask >= 1, worth, 0))


def move_ranks(adapters: Adapters, scores: dict[str, Array], amount: ArrayLike) -> Adapters:
    """Mask the ranks that are worth least, and give as many to matrices that lost none.

    The ``amount`` columns with the lowest scores of all are masked. The same number of new
    columns goes to the matrices of which none was masked, to all the same number, and what
    is left over to those with the highest mean score; a matrix whose columns are all in use
    gets none. A new column starts with the product zero.

    Args:
        adapters: with masks, all of them, not a half of a partition. Of a kind whose scale
            does not follow the rank (:class:`lrjax.adapters.NLS`) the adapted model
            changes by the masked columns alone.
        scores: ``{path: (*b, r)}`` as from :func:`lrjax.adapters.ablation_scores`.
        amount: how many move; in the paper one for each matrix.

    Returns:
        Adapters with other masks: the same shapes, so that rounds need no compilation.

    Raises:
        ValueError: if no adapter has a mask.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.adapters.NLS((4, 2)), key=jax.random.key(1))
        >>> two = lrjax.adapters.with_ranks(adapters, 2)
        >>> scores = {"layers.0": jnp.array([5.0, 1.0, 0, 0]), "layers.1": jnp.ones(4) * 3}
        >>> moved = lrjax.adapters.move_ranks(two, scores, 1)
        >>> moved["layers.0"].mask.tolist(), moved["layers.1"].mask.tolist()
        ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])

    Reference:
        Z. Liu et al., "ALoRA: allocating low-rank adaptation for fine-tuning large
        language models" (2024), arXiv:2403.16187.
    """
    table = Table("move_ranks", adapters)
    used, worth = table.mask >= 1, table.of(scores)
    places = jnp.argsort(jnp.argsort(jnp.where(used, worth, jnp.inf).ravel()))
    gone = (places.reshape(used.shape) < amount) & used
    mean = jnp.sum(jnp.where(used, worth, 0), axis=1) / jnp.maximum(used.sum(axis=1), 1)
    free = table.exists & ~used
    grants = _grants(~gone.any(axis=1), free.sum(axis=1), mean, amount)
    new = free & (jnp.cumsum(free, axis=1) <= grants[:, None])
    fresh = table.apart(new)

    def start(path: str, factors: Factors) -> Factors:
        """A product of zero, but not two factors of zeros, which would stay so."""
        pair = factors.pair
        zero = fresh[path] & jnp.any(pair.right != 0, axis=-2)
        left = jnp.where(zero[..., None, :], 0, pair.left)
        return eqx.tree_at(lambda a: a.pair.left, factors, left)

    mask = jnp.where(used & ~gone | new, 1.0, 0.0)
    return table.put(adapters, mask, start)


def _grants(untouched: Array, room: Array, mean: Array, amount: ArrayLike) -> Array:
    """How many columns each matrix gets: one at a time, to that which has least."""

    def give(_: Array, grants: Array) -> Array:
        takes = untouched & (grants < room)
        least = jnp.min(jnp.where(takes, grants, jnp.iinfo(jnp.int32).max))
        first = jnp.argmax(jnp.where(takes & (grants == least), mean, -jnp.inf))
        return grants.at[first].add(takes.any())

    return lax.fori_loop(0, amount, give, jnp.zeros(len(mean), jnp.int32))
