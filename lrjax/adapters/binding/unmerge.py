from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from ..._sites import Site
from ...linalg import outer, working_dtype
from ..protocol import Adapter, Adapters
from .as_lora import stacked_factors
from .bind import map_adapted


def unmerge(merged: PyTree, adapters: Adapters) -> PyTree:
    """The model before a merge, to rounding: ``W' − s · B A``, in float32 or float64.

    For kinds whose change is a product of factors, which says nothing of W: LoRA with any
    start, VeRA, LoRA-XS and their like. Every number is off by at most half a unit in the
    last place of W' and half of one of W. Where the model itself can be kept it is the
    better way, and the only one that is exact, in bfloat16 above all: there the rounding
    of W' is of the size of what adapters change.

    Args:
        merged: what :func:`lrjax.merge` gave, perhaps trained or merged into since.
        adapters: those that were merged, unchanged.

    Returns:
        A model of the structure and dtypes of ``merged``.

    Raises:
        ValueError: by path, for a change that is no product (DoRA, copies, rotations), a
            bias of its own, and weights of less than float32.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(2, init="small")
        >>> adapters = lrjax.adapt(layer, kind, key=jax.random.key(1))
        >>> back = lrjax.adapters.unmerge(lrjax.merge(layer, adapters), adapters)
        >>> bool(jnp.abs(back.weight - layer.weight).max() < 1e-7)
        True

    Reference:
        E. Hu et al., "LoRA: low-rank adaptation of large language models" (2021),
        arXiv:2106.09685, who switch tasks in this way.
    """

    def put(site: Site, own: Adapter) -> Any:
        found = stacked_factors(own, adapters.pools.get(own.pool_name() or ""))
        if found is None:
            raise ValueError(
                f"The adapter at {site.path!r} is a {type(own).__name__}, whose change is "
                "no product of factors that could be taken off: keep the model that it was "
                "merged into."
            )
        if working_dtype(site.dtype) != site.dtype:
            raise ValueError(
                f"The weight at {site.path!r} is {site.dtype}, whose rounding is of the "
                "size of what adapters change, so that subtracting does not give it back: "
                "keep the model, or merge into a float32 copy of it."
            )
        pair, scale = found
        weight = site.read()
        left, right = (x.astype(weight.dtype) for x in (pair.left, pair.right))
        left = left * jnp.asarray(scale, weight.dtype)[..., None, None]
        return site.put(weight - outer(left, right), site.bias)

    return map_adapted(put, merged, adapters)
