import dataclasses

import jax
import jax.numpy as jnp

from ...lowrank import LowRank
from ..kinds.around import Magnitude
from ..kinds.core.adapter import Core
from ..kinds.factors import Factors
from ..protocol import Adapter, Adapters, map_adapters
from ._parts import over_parts


def start_here(adapters: Adapters) -> Adapters:
    """The adapters at a change of zero, without moving a number that is trained.

    ``W' = W + s (B A − B₀ A₀)`` with the frozen ``B₀ = B`` and ``A₀ = A`` of this moment.
    Training goes on from these factors; in a call there are 2r columns. Before the first
    fold by :class:`lrjax.adapters.Continue` it gives adapters the structure that they
    keep, and where their change is zero anyway, as that of a new :class:`lrjax.LoRA`, it
    is all that it does.

    Args:
        adapters: of two factors, or with a trained core that is an array; copies and
            biases beside them stay. Any leading axes.

    Returns:
        Adapters whose frozen start is what they are.

    Raises:
        ValueError: by path, for an adapter that has no frozen start.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(layer, lrjax.LoRA(2), key=jax.random.key(1))
        >>> ones = lrjax.LowRank(jnp.ones((3, 2)), jnp.ones((4, 2)))
        >>> trained = eqx.tree_at(lambda a: a.layers[""].pair, adapters, ones)
        >>> here = lrjax.adapters.start_here(trained)
        >>> bool(jnp.allclose(lrjax.merge(layer, here).weight, layer.weight))
        True
    """

    def begun(path: str, adapter: Adapter) -> Adapter:
        def refuse(own: Adapter) -> ValueError:
            return ValueError(
                f"The adapter at {path!r} is a {type(own).__name__}, which has no frozen "
                "start that its change could count from: fold it with "
                "lrjax.adapters.Restart, or adapt the layer with lrjax.LoRA."
            )

        def beside(own: Adapter) -> Adapter:
            if isinstance(own, Magnitude):
                raise refuse(own)
            return own

        def inner(own: Adapter) -> Adapter:
            started = _started(own)
            if started is None:
                raise refuse(own)
            return started

        return over_parts(inner, beside, adapter)

    return map_adapters(begun, adapters)


def _started(own: Adapter) -> Adapter | None:
    """The adapter with its own numbers as its start, copied for a step that donates."""
    if isinstance(own, Factors) and own.thinning is None:
        left, right = own.pair.left, own.pair.right
        if own.gate is not None:  # the start has a mask and no gate
            left = (left * own.gate[..., None, :]).astype(left.dtype)
        start = jax.tree.map(jnp.copy, LowRank(left, right))
        return dataclasses.replace(own, start=start)
    if isinstance(own, Core) and isinstance(own.core, jax.Array):
        core = jax.nn.relu(own.core) if own.positive else own.core
        return dataclasses.replace(own, start=jnp.copy(core))
    return None
