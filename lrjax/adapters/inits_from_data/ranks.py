from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ..._sites import InputStatistic


def ranks_by_variance(
    statistics: Mapping[str, InputStatistic], rank: int, *, max_factor: float = 2.0
) -> dict[str, Any]:
    """Ranks for layers, as many in all as one rank gives, where inputs have most variance.

    The directions of all layers are sorted by the share that each explains of the variance
    of its layer's inputs; the first ``rank · layers`` are taken. Layers stacked for a scan
    have a rank each.

    Args:
        statistics: from :func:`lrjax.adapters.activation_statistics`.
        rank: the mean rank.
        max_factor: no layer has more than ``max_factor · rank``.

    Returns:
        ``{path: rank}`` of the layers that have one; the others are left out. Of a stack
        a list of ranks, zeros among them.

    Raises:
        ValueError: for a rank below 1 or a factor below 1, or a sketch that is narrower
            than the largest rank.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> batches = jax.random.normal(jax.random.key(1), (3, 50, 4))
        >>> statistics = lrjax.adapters.activation_statistics(
        ...     lambda model, x: jax.vmap(model)(x), model, batches)
        >>> ranks = lrjax.adapters.ranks_by_variance(statistics, 2)
        >>> kind = lambda path, site: (
        ...     lrjax.LoRA(ranks[path], init="eva") if path in ranks else None)
        >>> adapters = lrjax.adapt(
        ...     model, kind, data={path: statistics[path] for path in ranks},
        ...     key=jax.random.key(2))
        >>> sum(ranks.values())
        6

        Of layers stacked for a scan the rule answers with a kind for each:

        >>> layer = lambda key: eqx.nn.Linear(4, 4, key=key)
        >>> stack = eqx.filter_vmap(layer)(jax.random.split(jax.random.key(0), 3))
        >>> scan = lambda model, x: jax.lax.scan(
        ...     lambda x, one: (jax.vmap(one)(x), None), x, model)[0]
        >>> statistics = lrjax.adapters.activation_statistics(scan, stack, batches)
        >>> ranks = lrjax.adapters.ranks_by_variance(statistics, 2)
        >>> kinds = lambda path, site: [
        ...     lrjax.LoRA(rank, init="eva") if rank else None for rank in ranks[path]]
        >>> adapters = lrjax.adapt(
        ...     stack, kinds, data=statistics, key=jax.random.key(2))
        >>> lrjax.adapters.active_ranks(adapters)[""].tolist() == ranks[""]
        True

    Reference:
        F. Paischer et al., "One initialization to rule them all: fine-tuning via explained
        variance adaptation" (2024), arXiv:2410.07170.
    """
    if rank < 1 or max_factor < 1:
        raise ValueError(
            "ranks_by_variance needs a rank of at least 1 and a max_factor of at least 1, "
            f"got {rank} and {max_factor}."
        )
    most = round(rank * max_factor)
    found, ranks = [], {}
    for path, statistic in statistics.items():
        *stack, n = statistic.total.shape
        width = n if statistic.image is None else statistic.image.shape[-1]
        if width < min(most, n):
            raise ValueError(
                f"A layer may get rank {min(most, n)}, and the sketch at {path!r} has a "
                f"width of {width}: make it with a larger rank=."
            )
        ranks[path] = np.zeros(stack, int)
        shares = np.asarray(_shares(statistic))[..., :most]
        found += [(x, path, place[:-1]) for place, x in np.ndenumerate(shares)]
    budget = rank * sum(own.size for own in ranks.values())
    for _, path, layer in sorted(found, key=lambda one: -one[0])[:budget]:
        ranks[path][layer] += 1
    return {path: own.tolist() for path, own in ranks.items() if own.any()}


def _shares(statistic: InputStatistic) -> Float[Array, "*b k"]:
    shares = lambda one: one.principal()[0] / one.variance()
    for _ in statistic.count.shape:
        shares = jax.vmap(shares)
    return shares(statistic)
