from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ...lowrank import LowRank
from ..binding import stacked_factors
from ..kinds import Factors, Summed, Weighted
from ..protocol import Adapter, Adapters, Pool, with_stopped_gradients
from .stack import Stack


def select(
    stack: Stack,
    ids: str | int | ArrayLike | Sequence[str | int],
    weights: ArrayLike | Sequence[ArrayLike] | None = None,
) -> Adapters:
    """One adapter of a stack, or several at once with weights.

    One number gives that adapter. With a weight, or several numbers and weights, the
    changes are added, ``W' = W + Σ_k w_k (W_k − W)`` with the weights ``W_k`` of each, and
    biases likewise: products of factors side by side in one pair, other kinds one by one.
    A weight of one gives the adapter, zero the model. Weights have gradients, so a mixture
    may be learnt, and a batch of them may have one for each example or token.

    Differentiable, and made for ``vmap``: all examples share one product with the base, and
    each meets its own factors, at the arithmetic of one adapter.

    An activated LoRA (aLoRA) acts behind a position alone: weights of 0 before and 1 from
    there on, one for each token. Tokens before it have the base's keys and values, so that
    a cache of the base stays good::

        def project(weight, x):
            return lrjax.bind(layer, lrjax.adapters.select(stack, "judge", weight))(x)

        keys = jax.vmap(project)(jnp.arange(len(xs)) >= start, xs)

    Args:
        stack: from :func:`stack`.
        ids: a name, a number or an integer array ``()``; with weights ``(k,)`` also ``k``
            of them. A number out of range is an error where it is known, and the base
            where it is traced, under ``jit`` or ``vmap``, where nothing can be raised:
            check requests outside by ``stack.index``.
        weights: of the shape of ``ids``, any numbers.

    Returns:
        ``Adapters`` to :func:`lrjax.bind`, as they were stacked.

    Raises:
        KeyError: for a name that is not there.
        IndexError: for a number out of range, if it is known.
        TypeError: for what is neither a name nor an integer.
        ValueError: for several numbers without weights, or another number of weights.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> keys = jax.random.split(jax.random.key(1), 3)
        >>> three = [lrjax.adapt(model, lrjax.LoRA(2), key=k) for k in keys]
        >>> stack = lrjax.adapters.stack(three, model)
        >>> def answer(i, x):
        ...     return lrjax.bind(model, lrjax.adapters.select(stack, i))(x)
        >>> jax.vmap(answer)(jnp.array([3, 0, 1, 3]), jnp.ones((4, 4))).shape
        (4, 3)
        >>> two = lrjax.adapters.select(stack, ["1", "3"], [0.5, 0.5])
        >>> two["layers.0"].pair.rank
        4

    Reference:
        K. Greenewald et al., "Activated LoRA: fine-tuned LLMs for intrinsics" (2025),
        arXiv:2504.12397.
    """
    index = stack.index(ids)
    if jnp.ndim(index) > 1 or (jnp.ndim(index) and weights is None):
        raise ValueError(
            f"select takes one adapter, or several with weights, got ids of shape "
            f"{jnp.shape(index)} and weights {'none' if weights is None else 'too'}: "
            "jax.vmap over the ids of a batch, or pass weights for those that act at once."
        )
    if weights is None:
        return _taken(stack, index)
    weights = jnp.asarray(weights)
    weights = weights.astype(jnp.result_type(float, weights))
    if weights.shape != jnp.shape(index):
        raise ValueError(
            f"select needs a weight for each number, got ids of shape {jnp.shape(index)} "
            f"and weights of shape {weights.shape}."
        )
    row, weights = jnp.atleast_1d(jnp.asarray(index)), jnp.atleast_1d(weights)
    several = [_taken(stack, i) for i in row]
    layers = {
        path: _together(
            [own[path] for own in several],
            [own.pools for own in several],
            weights,
            stack.shared,
            path,
        )
        for path in stack.adapters.layers
    }
    groups = {own.pool_name() for own in layers.values()}
    pools = {name: pool for name, pool in several[0].pools.items() if name in groups}
    return Adapters(layers, pools, stack.adapters.axes)


def _taken(stack: Stack, index: int | Array) -> Adapters:
    """One entry; pools that all share are there as they are."""
    whole = stack.adapters
    take = lambda tree: jax.tree.map(lambda x: x[index], tree)
    pools = {
        name: pool if name in stack.shared else take(pool)
        for name, pool in whole.pools.items()
    }
    return Adapters(take(whole.layers), pools, whole.axes)


def _together(
    parts: list[Adapter],
    pools: list[dict[str, Pool]],
    weights: Float[Array, " k"],
    shared: tuple[str, ...],
    path: str,
) -> Adapter:
    """The changes of one weight, each times its own number."""
    first, group = parts[0], parts[0].pool_name()
    apart = len(parts) > 1 and group is not None and group not in shared
    if isinstance(first, Factors) or apart:
        own = [pool.get(group or "") for pool in pools]
        found = [
            stacked_factors(with_stopped_gradients(part), pool)
            for part, pool in zip(parts, own, strict=True)
        ]
        pairs = [pair for pair in found if pair is not None]
        if len(pairs) < len(found):
            raise ValueError(
                f"The adapters at {path!r} have a pool {group!r} each and are no products "
                "of factors, so several of them cannot act at once: make factors of them "
                "first, lrjax.adapters.as_lora(adapters, model, rank=…)."
            )
        return _side_by_side(pairs, weights, Summed(tuple(parts)).dropout_rate())
    stack = first.shape[:-2]
    weighted = tuple(
        Weighted(part, jnp.broadcast_to(weight, stack), train=True)
        for part, weight in zip(parts, weights, strict=True)
    )
    return weighted[0] if len(weighted) == 1 else Summed(weighted)


def _side_by_side(
    found: list[tuple[LowRank, Array]], weights: Float[Array, " k"], rate: Array | None
) -> Factors:
    """One pair of all columns, whose weights stand between the factors.

    There they are no part of the factors, which a batch of weights leaves as they are.
    """
    left = jnp.concatenate([pair.left for pair, _ in found], axis=-1)
    right = jnp.concatenate([pair.right for pair, _ in found], axis=-1)
    gates = [
        jnp.broadcast_to((w * scale)[..., None], (*scale.shape, pair.rank))
        for w, (pair, scale) in zip(weights, found, strict=True)
    ]
    gate = jnp.concatenate(gates, axis=-1)
    ones = jnp.ones(left.shape[:-2], gate.dtype)
    return Factors(LowRank(left, right), None, ones, rate, "both", gate=gate)
