from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from ..._sites import Site
from ...lowrank import LowRank, truncate
from ...merging import weighted_sum
from ..binding import (
    adapted_sites,
    beyond_factors,
    bias_change,
    dense_change,
    stacked_factors,
)
from ..kinds import Factors
from ..kinds.full import FullCopy
from ..protocol import Adapter, Adapters, Pool, Ready


Rule = Callable[[Sequence[PyTree], Any], PyTree]


def combine(
    adapters: Sequence[Adapters],
    weights: ArrayLike | Sequence[ArrayLike],
    model: PyTree,
    *,
    rule: Rule = weighted_sum,
    rank: int | None = None,
) -> Adapters:
    """One tree of adapters in place of several, merged by a rule of ``lrjax.merging``.

    By default exactly: ``W' = W + Σ_k w_k (W'_k − W)``, with the factors side by side.
    Adapters may be of any kind, have different ranks and scales, and be at other layers:
    one that has none at a layer changes nothing there. Where all changes are products the
    result is one, with the scale 1; the rule sees factors that carry ``√|s_k|`` each, with
    the scale ``s_k``. Where some are not (DoRA, full copies), it sees dense changes, and
    the result is a copy of the weight, or with ``rank`` factors again. One adapter of
    weight 1 gives what it is.

    Args:
        adapters: from :func:`lrjax.adapt`, all for this model.
        weights: ``(k,)``, one for each.
        model: the model that they were made for.
        rule: a function of changes and weights: ``lrjax.merging.weighted_sum`` and its
            neighbours, ``functools.partial(lrjax.merging.ties, density=0.3)``.
        rank: the largest width of the result; what is wider is cut to the best
            approximation.

    Returns:
        ``Adapters`` of :class:`lrjax.adapters.Factors` or of full copies, without pools and
        dropout.

    Raises:
        ValueError: for no adapters, another number of weights, and by path what the rule
            refuses; with ``rank``, for a change of a vector or a bias, which no product is.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> keys = jax.random.split(jax.random.key(1))
        >>> two = [lrjax.adapt(model, lrjax.LoRA(r), key=k) for r, k in zip((1, 2), keys)]
        >>> lrjax.adapters.combine(two, [0.5, 0.5], model)["layers.1"].pair.rank
        3

    Reference:
        S. Mangrulkar et al., "PEFT: state-of-the-art parameter-efficient fine-tuning
        methods" (2022), github.com/huggingface/peft, whose ``add_weighted_adapter`` is the
        special case of LoRA.
    """
    weights = jnp.asarray(weights)
    if not adapters or weights.shape != (len(adapters),):
        raise ValueError(
            f"combine needs one weight for each of {len(adapters)} trees of adapters, at "
            f"least one, got weights of shape {weights.shape}."
        )
    rows: dict[str, list[_Own]] = {}
    for tree, weight in zip(adapters, weights, strict=True):
        for path, (site, own, ready) in adapted_sites(model, tree).items():
            pool = tree.pools.get(own.pool_name() or "")
            rows.setdefault(path, []).append(_Own(site, own, pool, ready, weight))
    merged = {path: _merged(path, row, rule, rank) for path, row in rows.items()}
    axes = dict(pair for tree in adapters for pair in tree.axes)
    return Adapters(merged, {}, tuple(axes.items()))


class _Own(NamedTuple):
    """What one tree has at a layer."""

    site: Site
    adapter: Adapter
    pool: Pool | None
    ready: Callable[[], Ready]
    weight: Array


def _merged(path: str, row: list[_Own], rule: Rule, rank: int | None) -> Adapter:
    site, weights = row[0].site, jnp.stack([own.weight for own in row])
    factors = [stacked_factors(own.adapter, own.pool) for own in row]
    if all(found is not None for found in factors):
        change = rule([_split(*found) for found in factors if found is not None], weights)
        return _factors(change, site, rank)
    if rank is not None:
        _check_is_product(path, row)
    change = rule([dense_change(site, own.ready()) for own in row], weights)
    if rank is not None:
        return _factors(change, site, rank)
    dense = change.materialize() if isinstance(change, LowRank) else change
    matrix = (site.read() + dense).astype(site.dtype)
    if site.bias is None:
        return FullCopy(matrix, None)
    bias = rule([bias_change(site, own.ready()) for own in row], weights)
    return FullCopy(matrix, jnp.asarray(site.read_bias()) + bias)


def _split(pair: LowRank, scale: Array) -> LowRank:
    """The product with its scale on both factors alike."""
    root = jnp.sqrt(jnp.abs(scale))[..., None, None]
    right = jnp.sign(scale)[..., None, None] * root * pair.right
    return LowRank((root * pair.left).astype(pair.dtype), right.astype(pair.dtype))


def _factors(change: Any, site: Site, rank: int | None) -> Factors:
    if rank is not None and isinstance(change, LowRank):
        change = weighted_sum([change], jnp.ones(1), rank=rank)
    elif rank is not None:
        change = truncate(change, min(rank, *site.shape))
    return Factors(change, None, jnp.ones(site.stack, change.dtype), None, "both")


def _check_is_product(path: str, row: list[_Own]) -> None:
    site = row[0].site
    for what in (beyond_factors(site, own.ready()) for own in row):
        if what is not None:
            raise ValueError(
                f"combine(rank=…) cannot hold {what} at {path or 'the root'} in factors: "
                "leave the rank out, or that layer out of the adapters."
            )
