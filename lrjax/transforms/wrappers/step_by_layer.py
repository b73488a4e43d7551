from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..._matrices import path_name


class StepByLayerState(NamedTuple):
    """The state of :func:`step_by_layer`.

    Attributes:
        layers: that of the transform for each layer, stacked as the layers are.
        rest: that of the transform of the other parameters.
    """

    layers: Any
    rest: Any


class StepByLayer(NamedTuple):
    """A train step, as :func:`step_by_layer` makes it.

    Attributes:
        init: ``(layers, rest) -> state``.
        step: ``(layers, rest, state, *data) -> (layers, rest, state, value)``.
    """

    init: Callable[[PyTree, PyTree], StepByLayerState]
    step: Callable[..., tuple[PyTree, PyTree, StepByLayerState, Float[Array, ""]]]


def step_by_layer(
    embed: Callable[..., PyTree],
    layer: Callable[..., PyTree],
    loss: Callable[..., Array],
    tx: optax.GradientTransformation,
    *,
    fallback: optax.GradientTransformation | None = None,
) -> StepByLayer:
    """Make a train step that updates each layer as soon as the backward pass has left it.

    For a model of ``k`` layers of one kind, their parameters stacked::

        x_0 = embed(rest, *data)
        x_{i+1} = layer(layers[i], x_i, *data)          keeps all x_i
        value = loss(rest, x_k, *data)
        for i = k−1, …, 0:                              one program for all layers
            g, c ← the gradients of layers[i] and x_i, from c and x_i anew
            layers[i] ← layers[i] + tx.update(g, state[i], layers[i])

    and the other parameters last. The numbers are those of the plain step, but the
    gradient of one layer at a time exists, and the temporaries of one layer's update: with
    the old arrays donated, ``jax.jit(step, donate_argnums=(0, 1, 2))``, no second copy of
    the parameters or of the state either. As a plain step that keeps the inputs of its
    layers (``jax.checkpoint``) it runs each layer twice forward.

    The transform sees one layer: it must treat the layers of a stack one by one, as all
    of this library but :func:`lrjax.psgd` do. Whatever looks at all of the gradient first
    cannot work. A global norm, as of ``optax.clip_by_global_norm``, is that of one layer
    here; clip by layer, or limit updates with :func:`lrjax.limit_norm_growth`. Shard the
    axes of a layer, not that of the stack.

    Args:
        embed: ``(rest, *data) -> x``, what comes before the layers.
        layer: ``(parameters of one layer, x, *data) -> x``; ``x`` is a tree of floating
            arrays whose shapes do not change.
        loss: ``(rest, x, *data) -> value``, what comes behind them.
        tx: any optimizer, for the layers.
        fallback: that of the rest; ``tx`` by default.

    Returns:
        ``init(layers, rest)`` and ``step(layers, rest, state, *data)``, the latter to be
        jitted. ``layers`` are trees of arrays whose first axis counts the layers, the
        parameters ``rest`` may appear before and behind them.

    Raises:
        ValueError: in ``init``, if the leaves of ``layers`` do not have one first axis.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> embed = lambda rest, x, y: x @ rest["in"]
        >>> layer = lambda p, x, *_: x + jnp.tanh(x @ p["weight"])
        >>> loss = lambda rest, x, x0, y: jnp.mean((x @ rest["out"] - y) ** 2)
        >>> by_layer = lrjax.step_by_layer(embed, layer, loss, optax.adam(0.03))
        >>> layers = {"weight": 0.1 * jax.random.normal(jax.random.key(0), (6, 8, 8))}
        >>> rest = {"in": jnp.eye(4, 8), "out": jnp.ones((8, 1)) / 8}
        >>> x = jnp.linspace(-1, 1, 20).reshape(5, 4)
        >>> y = jnp.sin(3 * x[:, :1])
        >>> state, step = by_layer.init(layers, rest), jax.jit(by_layer.step)
        >>> for _ in range(100):
        ...     layers, rest, state, value = step(layers, rest, state, x, y)
        >>> print(value < 0.01)
        True

    Reference:
        K. Lv, Y. Yang, T. Liu, Q. Gao, Q. Guo, X. Qiu, "Full parameter fine-tuning for
        large language models with limited resources" (2023), arXiv 2306.09782, for plain
        SGD; J. Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank
        projection" (2024), arXiv 2403.03507, §3.4. Special case: the plain step.
    """
    tx = optax.with_extra_args_support(tx)
    other = tx if fallback is None else optax.with_extra_args_support(fallback)

    def init(layers, rest):
        _check_depth(layers)
        return StepByLayerState(jax.vmap(tx.init)(layers), other.init(rest))

    def step(layers, rest, state, *data):
        x, embed_back = jax.vjp(lambda rest: embed(rest, *data), rest)
        forward = lambda x, params: (layer(params, x, *data), x)
        x, inputs = lax.scan(forward, x, layers)
        value, loss_back = jax.vjp(lambda rest, x: loss(rest, x, *data), rest, x)
        rest_grads, cotangent = loss_back(jnp.ones_like(value))
        depth = _check_depth(layers)

        def of_one(params, own, x, cotangent):
            _, layer_back = jax.vjp(lambda p, x: layer(p, x, *data), params, x)
            grads, cotangent = layer_back(cotangent)
            updates, own = tx.update(grads, own, params)
            return optax.apply_updates(params, updates), own, cotangent

        # In a carry the layers and their states are updated in place; as inputs and
        # outputs of a scan both would exist twice.
        def backward(k, carry):
            layers, states, cotangent = carry
            at = depth - 1 - k
            params, own, x = (_cut(tree, at) for tree in (layers, states, inputs))
            # The branch is always taken. It is there because its results are whole before
            # any is written: XLA on CPU drops barriers, fuses the reading of one stack
            # with the writing of another, and copies both in every layer.
            keep = lambda params, own, x, cotangent: (params, own, cotangent)
            new = lax.cond(at >= 0, of_one, keep, params, own, x, cotangent)
            params, own, cotangent = new
            return _put(layers, params, at), _put(states, own, at), cotangent

        start = (layers, state.layers, cotangent)
        layers, states, cotangent = lax.fori_loop(0, depth, backward, start)
        (embed_grads,) = embed_back(cotangent)
        rest_grads = jax.tree.map(jnp.add, rest_grads, embed_grads)
        updates, rest_state = other.update(rest_grads, state.rest, rest)
        rest = optax.apply_updates(rest, updates)
        return layers, rest, StepByLayerState(states, rest_state), value

    return StepByLayer(init, step)


def _cut(stack: PyTree, at: Any) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, at, keepdims=False), stack)


def _put(stack: PyTree, one: PyTree, at: Any) -> PyTree:
    put = lambda x, y: lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), at, 0)
    return jax.tree.map(put, stack, one)


def _check_depth(layers: PyTree) -> int:
    """The length of the first axis of all leaves."""
    depths = {
        path_name(path): jnp.shape(x)[:1]
        for path, x in jtu.tree_flatten_with_path(layers)[0]
    }
    if len(set(depths.values())) != 1 or () in depths.values():
        found = ", ".join(f"{name}: {depth}" for name, depth in depths.items())
        raise ValueError(
            "step_by_layer needs the parameters of its layers stacked, the first axis of "
            f"each leaf counting them; got first axes of {found or 'no leaf at all'}."
        )
    ((depth,),) = set(depths.values())
    return depth
