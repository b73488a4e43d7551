from collections.abc import Iterable
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._arguments import check_key
from .._sites import (
    Call,
    InputStatistic,
    Site,
    Where,
    check_used_once,
    find_sites,
    over_batch,
    pick,
    refusals,
    sums_of_inputs,
)


def layer_statistics(
    model: PyTree,
    batches: Iterable[Any],
    *,
    call: Call = over_batch,
    where: Where = None,
    sensitivity: bool = True,
    key: PRNGKeyArray | None = None,
) -> dict[str, InputStatistic]:
    """What the layers of a model are used for, as sums over batches.

    Those of :func:`lrjax.adapters.activation_statistics`, of all layers that can be
    compressed and that the batches reach: for several budgets or methods they are summed
    once.

    Args:
        model: the module.
        batches: anything to go through once, some thousands of inputs in all.
        call: ``(model, batch) -> outputs``, by default ``jax.vmap(model)(batch)``.
        where: which layers, as in :func:`lrjax.adapt`; by default all ``eqx.nn.Linear``,
            ``Conv`` and ``Embedding``.
        sensitivity: whether to sum, beside the second moments of the inputs, those of the
            gradients at the outputs.
        key: for the random signs of the outputs whose gradients these are; by default the
            same in every call.

    Returns:
        ``{path: statistic}``.

    Raises:
        ValueError: if there are no batches, or a layer that ``where`` picks is not called
            or cannot be compressed.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> batches = jax.random.normal(jax.random.key(1), (3, 5, 4))
        >>> statistics = lrjax.compression.layer_statistics(model, batches)
        >>> statistics["layers.0"].count.item(), statistics["layers.0"].sensitivity.shape
        (15.0, (16, 16))
    """
    check_key("layer_statistics", key)
    sites = layers_of(model) if where is None else pick(find_sites(model), where)
    refused = refusals(model, sites, named=where is not None)
    sites = {path: site for path, site in sites.items() if path not in refused}
    check_used_once(model, sites)
    signs = (jr.key(0) if key is None else key) if sensitivity else None
    sums = sums_of_inputs("layer_statistics", call, model, batches, sites, signs=signs)
    seen = {path: one for path, one in sums.items() if np.all(one.count > 0)}
    if where is not None and seen.keys() != sums.keys():
        raise ValueError(
            f"No inputs were seen at {sorted(sums.keys() - seen.keys())}, which where= "
            "picks: the layer is not called in call(model, batch), or its output does not "
            "reach that of call in a differentiable way."
        )
    return seen


def layers_of(model: PyTree) -> dict[str, Site]:
    """The layers of a model that have a weight to compress."""
    kinds = ("linear", "conv", "lookup")
    return {path: site for path, site in find_sites(model).items() if site.kind in kinds}
