from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ...subspaces.bases.quantized import Codes, decode, encode
from ...subspaces.carry import has_moments, map_moments


class QuantizeStateState(NamedTuple):
    """The state of :func:`quantize_state`.

    Attributes:
        count: the number of steps.
        inner: the state of the inner transform, its moments as ``subspaces.Codes``.
    """

    count: Int[Array, ""]
    inner: Any


def quantize_state(
    inner: optax.GradientTransformation, *, block: int = 256, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Keep the moments of any optimizer at eight bits a number between its steps.

    Before a step the moments are decoded, after it they are encoded: a code of 127
    magnitudes and a sign for first moments, of 255 magnitudes for second ones, each in
    geometric progression below the largest of its block. The relative error is at most
    9.5 % and 6.6 %, however small a number is next to the largest (down to ``10⁻⁵`` and
    ``10⁻⁷``), and a second moment is never stored as zero, so that no step explodes.
    Rounding is dithered: over the steps it averages out, and slow averages stay slow
    averages.

    Put it around a whole recipe: ``quantize_state(galore(1e-2))``. It finds the moments
    inside whatever their state is by type; :func:`lrjax.subspaces.register_roles` tells it
    of further types. Bases, counters, buffers and scales stay as they are.

    Args:
        inner: any transform or optimizer.
        block: how many numbers share a scale: runs along the longer one of the last two
            axes.
        min_size: smaller arrays stay in full precision; there is nothing to gain.

    Returns:
        The transform. For ``n`` numbers in rows of ``k ≤ block`` it keeps ``n`` bytes and
        ``n/k`` scales.

    Raises:
        ValueError: at ``init``, if no moment is found.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> params = {"weight": jnp.zeros((256, 512))}
        >>> tx = lrjax.subspace_adam(1e-3, rank=32)
        >>> for tx in (tx, lrjax.quantize_state(tx)):
        ...     print(round(lrjax.metrics.memory_report(params, tx).ratio, 3))
        0.156
        0.063

    Reference:
        T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, "8-bit optimizers via
        block-wise quantization" (2021), arXiv 2110.02861, for the blocks; the code and the
        dither are ours.
    """
    inner = optax.with_extra_args_support(inner)

    def store(state, step):
        def one(x, signed):
            fits = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
            if not fits or x.ndim == 0 or x.size < min_size:
                return x
            return encode(x, signed=signed, block=block, step=step)

        return map_moments(one, state)

    def load(state):
        return map_moments(lambda x, _: decode(x) if isinstance(x, Codes) else x, state)

    def init(params):
        state = inner.init(params)
        if not has_moments(state):
            raise ValueError(
                "quantize_state found no moments of known role in the state of the inner "
                f"transform ({type(state).__name__}). Say which fields are moments with "
                "lrjax.subspaces.register_roles(type, first=…, second=…)."
            )
        count = jnp.zeros((), jnp.int32)
        return QuantizeStateState(count, store(state, count))

    def update(updates, state, params=None, **extra):
        updates, new = inner.update(updates, load(state.inner), params, **extra)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, QuantizeStateState(count, store(new, count))

    return optax.GradientTransformationExtraArgs(init, update)
