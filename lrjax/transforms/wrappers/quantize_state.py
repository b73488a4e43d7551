from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ..._arguments import checks_trees
from ..._codes import (
    KINDS,
    Bits,
    check_bits,
    dequantize,
    is_quantized,
    join_codes,
    quantize,
    split_codes,
)
from ..._moments import has_moments, map_moments, state_names
from ...linalg import increment


class QuantizeStateState(NamedTuple):
    """The state of :func:`quantize_state`.

    Attributes:
        count: the number of steps.
        inner: the state of the inner transform, with a ``BlockQuantized``, or at four
            bits a ``PackedQuantized``, of two trees in the place of each tree of moments;
            those that are kept as they are stand among the codes.
    """

    count: Int[Array, ""]
    inner: Any


@checks_trees
def quantize_state(
    inner: optax.GradientTransformation,
    *,
    block: int = 256,
    min_size: int = 4096,
    bits: Bits = 8,
) -> optax.GradientTransformationExtraArgs:
    """Keep the moments of any optimizer at eight or four bits a number between its steps.

    Before a step the moments are dequantized, after it they are quantized: a code of 127
    magnitudes and a sign for first moments, of 255 magnitudes for second ones, each in
    geometric progression below the largest of its block. The relative error is at most
    9.5 % and 6.6 %, however small a number is next to the largest (down to ``10⁻⁵`` and
    ``10⁻⁷``), and a second moment is never stored as zero, so that no step explodes.
    Rounding is dithered: over the steps it averages out, and slow averages stay slow
    averages.

    At four bits the magnitudes are powers of two, seven and a sign for first moments,
    sixteen and no zero for second ones: half of the state again, and more noise in it.

    Put it around a whole recipe: ``quantize_state(galore(1e-2))``. It finds the moments
    inside whatever their state is by type; :func:`lrjax.subspaces.register_moments` tells
    it of further types. Bases, counters, buffers and scales stay as they are.

    Args:
        inner: any transform or optimizer.
        block: how many numbers share a scale: runs along the longer one of the last two
            axes.
        min_size: smaller arrays stay in full precision; there is nothing to gain.
        bits: eight or four a number. At four, arrays whose last axis is odd stay in full
            precision: two neighbors share a byte.

    Returns:
        The transform. For ``n`` numbers in rows of ``k ≤ block`` it keeps ``n`` bytes, at
        four bits ``n/2``, and ``n/k`` scales.

    Raises:
        ValueError: for other ``bits``; at ``init``, if no moment is found.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> params = {"weight": jnp.zeros((256, 512))}
        >>> tx = lrjax.subspace_adam(1e-3, rank=32)
        >>> for tx in (tx, lrjax.quantize_state(tx), lrjax.quantize_state(tx, bits=4)):
        ...     print(round(lrjax.metrics.memory_report(params, tx).ratio, 3))
        0.156
        0.063
        0.047

    Reference:
        T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, "8-bit optimizers via
        block-wise quantization" (2021), arXiv 2110.02861, for the blocks; B. Li, J. Chen,
        J. Zhu, "Memory efficient optimizers with 4-bit states" (2023), arXiv 2309.01507,
        for four bits and second moments without a zero; the codes and the dither are ours.
    """
    check_bits(bits)
    inner = optax.with_extra_args_support(inner)

    def store(state, step):
        def one(x, signed):
            fits = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
            if not fits or x.ndim == 0 or x.size < min_size:
                return x
            if bits == 4 and x.shape[-1] % 2:
                return x
            return quantize(x, signed=signed, block=block, bits=bits, step=step)

        def all_of(tree, signed):
            return split_codes(jax.tree.map(lambda x: one(x, signed), tree), KINDS[bits])

        return map_moments(all_of, state)

    def load(state):
        one = lambda x: dequantize(x) if is_quantized(x) else x
        all_of = lambda tree: jax.tree.map(one, join_codes(tree), is_leaf=is_quantized)
        return map_moments(lambda tree, _: all_of(tree), state)

    def init(params):
        state = inner.init(params)
        if not has_moments(state):
            raise ValueError(
                "quantize_state knows no moments in the inner transform's state, which is "
                f"made of {state_names(state)}. Say which fields are moments with "
                "lrjax.subspaces.register_moments(type, first=…, second=…)."
            )
        count = jnp.zeros((), jnp.int32)
        return QuantizeStateState(count, store(state, count))

    def update(updates, state, params=None, **extra):
        updates, new = inner.update(updates, load(state.inner), params, **extra)
        count = increment(state.count)
        return updates, QuantizeStateState(count, store(new, count))

    return optax.GradientTransformationExtraArgs(init, update)
