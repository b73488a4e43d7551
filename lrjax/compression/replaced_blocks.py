"""Blocks that stand in for others, with a low-rank rest of their own."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..linalg import nonzero, singular_values, truncated_svd, working_dtype
from ..lowrank import LowRank


def residual_low_rank(
    target: Float[Array, "*b m n"], base: Float[Array, "*b m n"], rank: int
) -> LowRank:
    """What a weight is beside another one, in factors: ``SVD_r(target − base) = (U Σ) Vᵀ``.

    Added to the base it is the start of an adapter that makes one layer stand in for
    another; of a fine-tuned weight and the one before it is what was learned. For a whole
    stack of blocks that share their weights: :func:`lrjax.nn.share_blocks`.

    Args:
        target: the weight to be imitated; stacks allowed.
        base: the one that is there.
        rank: the width; ``min(m, n)`` imitates exactly.

    Returns:
        ``left = U_r Σ_r`` and ``right = V_r``, in float32 or wider.

    Raises:
        ValueError: for a rank out of range.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> base, target = jnp.eye(3), jnp.eye(3).at[0, 1].set(2.0)
        >>> rest = lrjax.compression.residual_low_rank(target, base, 1)
        >>> bool(jnp.allclose(base + rest.materialize(), target, atol=1e-5))
        True

    Reference:
        S. Bae, A. Fisch, H. Harutyunyan, Z. Ji, S. Kim, T. Schuster, "Relaxed recursive
        transformers: effective parameter sharing with layer-wise LoRA" (2024), arXiv
        2410.20672.
    """
    dtype = working_dtype(target.dtype)
    found = truncated_svd(target.astype(dtype) - base.astype(dtype), rank)
    return LowRank(found.left * found.values[..., None, :], found.right)


def block_influence(
    inputs: Float[Array, "*b n"], outputs: Float[Array, "*b n"]
) -> Float[Array, ""]:
    """How much a block turns what goes through it: one minus the mean cosine.

    ``1 − E[x·y / (‖x‖ ‖y‖)]``. Blocks of the least influence are missed least.

    Args:
        inputs: x, hidden states before the block; the last axis holds their features.
        outputs: y, those after it.

    Returns:
        A number, 0 for a block that only stretches.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(lrjax.compression.block_influence(x, x.at[1].set(jnp.array([2.0, 0.0]))))
        0.5

    Reference:
        J. S. Smith, C.-H. Lin, S. Tuli, H. Jeelani, S. Gao, Y. Shen, H. Jin, Y.-C. Hsu,
        "FlexiGPT: pruning and extending large language models with low-rank weight sharing"
        (2025), arXiv 2501.14713.
    """
    dtype = working_dtype(inputs.dtype)
    x, y = inputs.astype(dtype), outputs.astype(dtype)
    length = lambda x: nonzero(jnp.sqrt(jnp.sum(x**2, axis=-1)))
    return 1 - jnp.mean(jnp.sum(x * y, axis=-1) / (length(x) * length(y)))


def replacement_errors(
    blocks: PyTree[Float[Array, "layers ..."]], index: ArrayLike, rank: int
) -> Float[Array, " layers"]:
    """What is left of a block when each of the others stands in for it, with a rest.

    ``Σ_W ‖(W_i − W_j) − SVD_r(W_i − W_j)‖²_F`` over the weights of the block, for all j;
    vectors count whole. The block that replaces a pruned one is that of the least error,
    among those that stay, and :func:`residual_low_rank` what goes with it.

    Args:
        blocks: the weights of all blocks, stacked: ``(layers, m, n)`` of matrices.
        index: i, the block to be replaced.
        rank: r, of the rests.

    Returns:
        ``(layers,)``; infinite for the block itself.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> blocks = jax.random.normal(jax.random.key(0), (4, 6, 6))
        >>> blocks = blocks.at[1].set(blocks[3] + jnp.outer(jnp.ones(6), jnp.arange(6.0)))
        >>> print(jnp.argmin(lrjax.compression.replacement_errors(blocks, 1, rank=1)))
        3

    Reference:
        J. S. Smith, C.-H. Lin, S. Tuli, H. Jeelani, S. Gao, Y. Shen, H. Jin, Y.-C. Hsu,
        "FlexiGPT: pruning and extending large language models with low-rank weight sharing"
        (2025), arXiv 2501.14713.
    """
    leaves = [lax.stop_gradient(x) for x in jax.tree.leaves(blocks)]

    def left(x: Array) -> Array:
        x = x.astype(working_dtype(x.dtype))
        x = x[jnp.asarray(index)][None] - x
        if x.ndim < 3:
            return jnp.sum(x.reshape(len(x), -1) ** 2, axis=-1)
        squares = singular_values(x)[..., rank:] ** 2
        return jnp.sum(squares.reshape(len(x), -1), axis=-1)

    errors = jax.tree.reduce(jnp.add, [left(x) for x in leaves])
    return jnp.where(jnp.arange(len(errors)) == index, jnp.inf, errors)
