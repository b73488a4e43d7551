from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from ..._sites import Site
from ..binding import map_adapted
from ..kinds.factors import Factors
from ..kinds.full import FullCopy
from ..protocol import Adapter, Adapters, map_adapters, partition
from ._parts import over_parts
from .heads import (
    head_count,
    head_keys,
    head_shares,
    is_product,
    mean_change,
    part_of,
    weight_part,
)
from .moments import KeepMoments, MomentRule
from .rules import FoldRule, mean_of_heads


class Average(FoldRule):
    """Heads become their mean number by number, and the weights what that misses.

        B̄ = Σ_h p_h B_h,   Ā = Σ_h p_h A_h,   W ← W + s (Σ_h p_h B_h A_h − B̄ Ā)

    The mean of factors is not the factors of the mean: it has every ``B_g A_h`` in it. With
    what it misses in the weights, the model after the fold is the mean of the heads all
    the same, to the rounding of its weights. Without (``exact=False``) it is the usual
    averaging of factors, FedIT, which is exact only where one factor is frozen and all
    heads have the same (FFA-LoRA): ``lrjax.LoRA(train="left")``, made once and repeated::

        one = lrjax.adapt(model, kind, key=key)
        heads = jax.tree.map(lambda x: jnp.stack([x] * 8), one)

    Numbers that are frozen stay what they are in each head. A column that a mask takes
    away from a head counts as zeros there, and stays away.

    Args:
        moments: the rule for the state of the optimizer of each head.
        exact: whether the weights take what the mean misses. It needs changes that are a
            product of factors, or copies and biases, and all heads of one rank.
        axis_name: under ``shard_map``, the axis of the mesh that heads lie along.

    Raises:
        ValueError: when it folds, by path, for adapters that ``exact`` cannot hold.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> one = lambda key: lrjax.adapt(layer, lrjax.LoRA(2, init="small"), key=key)
        >>> heads = jax.vmap(one)(jax.random.split(jax.random.key(1), 5))
        >>> want = lrjax.adapters.merge_heads(layer, heads).weight
        >>> rule = lrjax.adapters.Average()
        >>> base, heads, _ = rule(layer, heads, (), key=jax.random.key(2))
        >>> got = lrjax.merge(base, jax.tree.map(lambda x: x[0], heads)).weight
        >>> bool(jnp.allclose(got, want))
        True

    Reference:
        R. Singhal, K. Ponkshe, P. Vepakomma, "FedEx-LoRA: exact aggregation for federated
        and efficient fine-tuning of foundation models" (2024), arXiv:2410.09432; J. Zhang
        et al., "Towards building the federated GPT: federated instruction tuning" (2023),
        arXiv:2305.05644; Y. Sun et al., "Improving LoRA in privacy-preserving federated
        learning" (2024), arXiv:2403.12313. The special case of heads that are all the
        same: nothing changes.
    """

    moments: MomentRule
    exact: bool = eqx.field(static=True)
    axis_name: str | None = eqx.field(static=True)

    def __init__(
        self,
        moments: MomentRule | None = None,
        *,
        exact: bool = True,
        axis_name: str | None = None,
    ):
        self.moments = KeepMoments() if moments is None else moments
        self.exact, self.axis_name = exact, axis_name

    def __call__(self, model, adapters, state, *, key, weights=None):
        """Average, and put into the weights what that misses."""
        shares = head_shares(adapters, weights, self.axis_name)
        params, frozen = partition(map_adapters(_without_masked, adapters))
        params = jax.tree.map(mean_of_heads(shares, self.axis_name), params)
        new = eqx.combine(params, frozen)
        if self.exact:
            model = self._with_rest(model, adapters, new, shares)
        each = lambda state, old, new, key: self.moments(state, old, new, key=key)
        keys = head_keys(key, head_count(adapters), self.axis_name)
        return model, new, jax.vmap(each)(state, adapters, new, keys)

    def _with_rest(
        self, model: PyTree, old: Adapters, new: Adapters, shares: Float[Array, " h"]
    ) -> PyTree:
        """The model with what the mean of the factors misses."""

        def put(site: Site, _: Adapter) -> Any:
            _check_can_be_exact(site.path, *part_of(old, site.path))
            if isinstance(weight_part(old[site.path]), FullCopy):
                return site.layer
            mean = lambda of: mean_change(
                site, *part_of(of, site.path), shares, self.axis_name
            )
            return site.put(site.read() + mean(old) - mean(new), site.bias)

        return map_adapted(put, model, jax.tree.map(lambda x: x[0], old))


def _check_can_be_exact(path: str, heads: Adapter, pool: Any) -> None:
    own = weight_part(heads)
    if isinstance(own, Factors) and own.mask is not None:
        raise ValueError(
            f"The heads at {path!r} have masks, of ranks that may differ, and then each "
            "has another part of the mean: fold them with lrjax.adapters.Restart, which is "
            "exact, or with Average(exact=False)."
        )
    if not isinstance(own, FullCopy) and not is_product(own, pool):
        raise ValueError(
            f"The adapter at {path!r} is a {type(own).__name__}, whose change is no "
            "product of factors: what the mean misses would not be a change of the weight "
            "alone. Fold with lrjax.adapters.Restart, or with Average(exact=False)."
        )


def _without_masked(_: str, adapter: Adapter) -> Adapter:
    """Zeros in the columns that a mask takes away."""

    def inner(own: Any) -> Any:
        if not isinstance(own, Factors) or own.mask is None:
            return own
        kept = lambda x: (x * (own.mask != 0)[..., None, :]).astype(x.dtype)
        return eqx.tree_at(lambda a: a.pair, own, jax.tree.map(kept, own.pair))

    return over_parts(inner, lambda own: own, adapter)
