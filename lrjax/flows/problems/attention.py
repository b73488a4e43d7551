"""One layer of attention whose weights are products of factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from ..._arguments import check_key
from ..._sharding import einsum
from ...lowrank import LowRank


class Attention(NamedTuple):
    """The two products of the weights of a head.

    Attributes:
        key_query: ``W_Q W_Kᵀ (d, d)``, which says who looks at whom. A stack of matrices
            stands for its block diagonal: ``(d, 1, 1)`` for a diagonal.
        value_output: ``W_V W_Oᵀ``, which says what is passed on; likewise.
    """

    key_query: LowRank
    value_output: LowRank


def attention(
    weights: Attention, sequences: Float[Array, "examples length d"]
) -> Float[Array, "examples length d"]:
    """A layer of attention without the residual, ``softmax(X W_QK Xᵀ) X W_VO``.

    Args:
        weights: the products, in factors.
        sequences: ``X``.

    Returns:
        What the layer adds to the sequences.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> none, one = jnp.zeros((2, 1)), jnp.eye(2)
        >>> weights = lrjax.flows.Attention(
        ...     lrjax.LowRank(none, none), lrjax.LowRank(one, one))
        >>> print(lrjax.flows.attention(weights, jnp.eye(2)[None])[0])  # the mean
        [[0.5 0.5]
         [0.5 0.5]]
    """
    asked = _through(sequences, weights.key_query)
    scores = einsum("etd,esd->ets", asked, sequences)
    seen = einsum("ets,esd->etd", jax.nn.softmax(scores, axis=-1), sequences)
    return _through(seen, weights.value_output)


def _through(x: Array, weight: LowRank) -> Array:
    """``x W``, block by block where W is a stack."""
    left, right = (
        side.reshape(-1, *side.shape[-2:]) for side in (weight.left, weight.right)
    )
    blocks = x.reshape(*x.shape[:-1], len(left), -1)
    return einsum("etki,kir,kjr->etkj", blocks, left, right).reshape(*x.shape[:-1], -1)


def attention_loss(
    weights: Attention,
    sequences: Float[Array, "examples length d"],
    targets: Float[Array, "examples length d"],
) -> Scalar:
    """Least squares of a layer of attention, half the mean over examples and positions.

    From factors of size α the weights are learnt a rank at a time, at times that are
    multiples of ``ln(1/α)``: :func:`gradual_stages` has them for diagonal weights.

    Args:
        weights: the products, in factors.
        sequences: ``X``.
        targets: what the layer should add.

    Returns:
        The loss.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> values = lrjax.LowRank(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)))
        >>> teacher = lrjax.flows.Attention(values, values)
        >>> task = lrjax.flows.attention_task(
        ...     teacher, examples=4, length=3, key=jax.random.key(0))
        >>> float(lrjax.flows.attention_loss(teacher, *task))
        0.0

    Reference:
        E. Boix-Adsera, E. Littwin, E. Abbe, S. Bengio, J. Susskind, "Transformers learn
        through gradual rank increase" (2023), arXiv 2306.07042.
    """
    error = attention(weights, sequences) - targets
    return 0.5 * jnp.mean(jnp.sum(error**2, axis=-1))


class AttentionTask(NamedTuple):
    """Sequences and what a layer of attention should add to them."""

    sequences: Float[Array, "examples length d"]
    targets: Float[Array, "examples length d"]


def attention_task(
    teacher: Attention, *, examples: int, length: int, key: PRNGKeyArray
) -> AttentionTask:
    """White sequences and what a teacher makes of them.

    Args:
        teacher: its weights.
        examples: how many sequences.
        length: of each.
        key: for the sequences.

    Returns:
        An :class:`AttentionTask`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> values = lrjax.LowRank(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1)))
        >>> teacher = lrjax.flows.Attention(values, values)
        >>> task = lrjax.flows.attention_task(
        ...     teacher, examples=4, length=3, key=jax.random.key(0))
        >>> task.targets.shape
        (4, 3, 2)
    """
    check_key("attention_task", key)
    left = teacher.value_output.left
    width = left.shape[-2] * (len(left) if left.ndim == 3 else 1)
    sequences = jr.normal(key, (examples, length, width), left.dtype)
    return AttentionTask(sequences, attention(teacher, sequences))
