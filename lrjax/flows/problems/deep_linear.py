"""Products of weights, trained whole or by adapters."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from ..._arguments import check_key
from ..._sharding import einsum
from ...linalg import orthonormalize, times
from ...lowrank import LowRank


class TwoLayers(NamedTuple):
    """The weights of ``second @ first``: frozen matrices, or their adapters."""

    first: PyTree[Array]
    second: PyTree[Array]


def two_layer_loss(
    adapters: TwoLayers, base: TwoLayers, target: Float[Array, "m n"]
) -> Scalar:
    """LoRA in a two-layer factorization: ``½‖Y − (W₂ + X₂)(W₁ + X₁)‖²``.

    Args:
        adapters: ``X₁ (h, n)`` and ``X₂ (m, h)`` as LowRank, or ``None`` for a layer that
            is not adapted.
        base: the frozen ``W₁`` and ``W₂``.
        target: ``Y``.

    Returns:
        The loss.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> base = lrjax.flows.TwoLayers(jnp.eye(2), jnp.eye(2))
        >>> none = lrjax.flows.TwoLayers(None, None)
        >>> float(lrjax.flows.two_layer_loss(none, base, 3 * jnp.eye(2)))
        4.0
    """
    return deep_lora_loss(adapters, base, target)


def deep_linear_loss(
    weights: Sequence[Float[Array, "_ _"]], target: Float[Array, "m n"]
) -> Scalar:
    """A deep linear network with white inputs: ``½‖M − W_N ⋯ W_1‖²``.

    Args:
        weights: ``W_1`` to ``W_N``, the first layer first.
        target: ``M``.

    Returns:
        The loss.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> weights = [jnp.ones((3, 2)), jnp.ones((1, 3))]
        >>> float(lrjax.flows.deep_linear_loss(weights, jnp.zeros((1, 2))))
        9.0
    """
    product = weights[0]
    for weight in weights[1:]:
        product = times(weight, product)
    return 0.5 * jnp.sum((target - product) ** 2)


def deep_lora_loss(
    adapters: Sequence[LowRank | None],
    base: Sequence[Float[Array, "_ _"]],
    target: Float[Array, "m n"],
) -> Scalar:
    """LoRA in every layer of a deep linear network, ``½‖M − (W_L + X_L) ⋯ (W_1 + X_1)‖²``.

    How low it gets is :func:`deep_lora_floor`, and where :func:`deep_lora_optimum`.

    Args:
        adapters: ``X_1`` to ``X_L``, the first layer first; ``None`` for a layer that is
            not adapted.
        base: the frozen ``W_1`` to ``W_L``.
        target: ``M``.

    Returns:
        The loss.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> one = lrjax.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> weights = [jnp.ones((1, 1)), jnp.ones((1, 1))]
        >>> float(lrjax.flows.deep_lora_loss([one, None], weights, 4 * weights[0]))
        2.0
    """
    weights = [
        weight if adapter is None else weight + adapter.materialize()
        for weight, adapter in zip(base, adapters, strict=True)
    ]
    return deep_linear_loss(weights, target)


class LoraTask(NamedTuple):
    """A pretrained two-layer factorization and what it is to be tuned to.

    Attributes:
        base: the frozen weights, ``second @ first = Y_pre``, balanced.
        target: ``Y_pre + change``.
        change: the difference.
    """

    base: TwoLayers
    target: Float[Array, "m n"]
    change: Float[Array, "m n"]


def lora_task(
    values: Float[Array, " h"],
    change: Float[Array, " c"],
    *,
    shape: tuple[int, int],
    aligned: bool,
    key: PRNGKeyArray,
) -> LoraTask:
    """A random pretrained matrix and a low-rank change of it.

    Args:
        values: singular values of ``Y_pre``; their number is the hidden width h.
        change: singular values of the change; their number is its rank.
        shape: ``(m, n)``, neither smaller than h.
        aligned: if True, the change has the leading singular vectors of ``Y_pre``; if
            False, vectors of its own.
        key: for the singular vectors.

    Returns:
        A :class:`LoraTask`.

    Raises:
        ValueError: if a side is smaller than h or than the rank of the change.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> key, change = jax.random.key(0), jnp.array([2.0])
        >>> task = lrjax.flows.lora_task(
        ...     jnp.ones(4), change, shape=(6, 5), aligned=True, key=key
        ... )
        >>> task.base.first.shape, task.base.second.shape, task.target.shape
        ((4, 5), (6, 4), (6, 5))
    """
    check_key("lora_task", key)
    (m, n), h, c = shape, len(values), len(change)
    if min(m, n) < max(h, c):
        raise ValueError(
            f"lora_task needs both sides of the shape {shape} to be at least the number "
            f"of singular values, {h} of the base and {c} of the change."
        )
    ku, kv, kr, kl, kw = jr.split(key, 5)
    dtype = values.dtype
    u, v = _orthonormal(ku, m, h, dtype), _orthonormal(kv, n, h, dtype)
    rotation, root = _orthonormal(kr, h, h, dtype), jnp.sqrt(values)
    first = einsum("ih,h,nh->in", rotation, root, v)
    second = einsum("mh,h,ih->mi", u, root, rotation)
    if aligned:
        if c > h:
            raise ValueError(
                f"An aligned change has at most the rank of the base, {h}; got {c} values."
            )
        left, right = u[:, :c], v[:, :c]
    else:
        left, right = _orthonormal(kl, m, c, dtype), _orthonormal(kw, n, c, dtype)
    difference = einsum("mc,c,nc->mn", left, change.astype(dtype), right)
    target = times(second, first) + difference
    return LoraTask(TwoLayers(first, second), target, difference)


def _orthonormal(key: PRNGKeyArray, n: int, r: int, dtype) -> Array:
    return orthonormalize(jr.normal(key, (n, r), dtype))
