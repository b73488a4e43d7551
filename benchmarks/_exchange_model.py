"""One small model with every kind of layer that PEFT adapts, as torch names its parts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import lrjax


WIDTH, TOKENS, EXPERTS = 8, 13, 3


class Attention(eqx.Module):
    """Two projections, one with a bias."""

    q_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear


class Layers(eqx.Module):
    """Two projections of another size."""

    up_proj: eqx.nn.Linear
    down_proj: eqx.nn.Linear


class Block(eqx.Module):
    """A layer of the model."""

    self_attn: Attention
    mlp: Layers

    def __init__(self, key):
        k = jr.split(key, 4)
        linear = lambda i, o, key, bias: eqx.nn.Linear(i, o, use_bias=bias, key=key)
        self.self_attn = Attention(
            linear(WIDTH, WIDTH, k[0], True), linear(WIDTH, 4, k[1], False)
        )
        self.mlp = Layers(linear(WIDTH, 12, k[2], True), linear(12, WIDTH, k[3], True))


class Experts(eqx.Module):
    """Two parameters that hold a matrix ``(out, in)`` for each expert."""

    gate_up_proj: jax.Array
    down_proj: jax.Array


class Body(eqx.Module):
    """All but the head."""

    embed_tokens: eqx.nn.Embedding
    layers: list
    experts: Experts
    conv: eqx.nn.Conv2d
    c_attn: eqx.nn.Linear  # which torch keeps (in, out), as GPT-2
    norm: eqx.nn.LayerNorm


class Net(eqx.Module):
    """The parts; how they are put together does not matter here."""

    model: Body
    lm_head: eqx.nn.Linear

    def __init__(self, key):
        k = jr.split(key, 8)
        self.model = Body(
            eqx.nn.Embedding(TOKENS, WIDTH, key=k[0]),
            [Block(k[1]), Block(k[2])],
            Experts(
                jr.normal(k[3], (EXPERTS, 10, WIDTH)), jr.normal(k[4], (EXPERTS, WIDTH, 5))
            ),
            eqx.nn.Conv2d(2, 4, (3, 2), stride=2, padding=1, key=k[5]),
            eqx.nn.Linear(WIDTH, 3 * WIDTH, key=k[6]),
            eqx.nn.LayerNorm(WIDTH),
        )
        self.lm_head = eqx.nn.Linear(WIDTH, TOKENS, use_bias=False, key=k[7])


def name_of(path) -> str:
    """What torch calls a leaf."""
    return jtu.keystr(path, simple=True, separator=".")


def with_weights(model, weights: dict[str, np.ndarray]):
    """The model with the arrays of torch in place of its own."""

    def put(path, x):
        if not hasattr(x, "shape"):
            return x
        stored = weights[name_of(path)]
        stored = stored.T if "c_attn.weight" in name_of(path) else stored
        return jnp.asarray(stored).reshape(x.shape)

    return jtu.tree_map_with_path(put, model)


def net(weights: dict[str, np.ndarray]) -> Net:
    """The model with given weights, none of its own made."""
    return with_weights(eqx.filter_eval_shape(Net, jr.key(0)), weights)


def stacked(model: Net) -> Net:
    """The same model with its layers stacked for ``lax.scan``."""
    arrays, static = zip(
        *(eqx.partition(x, eqx.is_array) for x in model.model.layers), strict=True
    )
    together = jax.tree.map(lambda *xs: jnp.stack(xs), *arrays)
    return eqx.tree_at(lambda m: m.model.layers, model, eqx.combine(together, static[0]))


def axes(path: str, array) -> lrjax.MatrixSpec | None:
    """The experts are matrices ``(out, in)``."""
    if "experts" in path:
        return lrjax.MatrixSpec(rows=(1,), cols=(2,))
    return None


def part(model, name: str):
    """The part of a model with this name."""
    for step in name.split("."):
        model = model[int(step)] if step.isdigit() else getattr(model, step)
    return model


def inputs(module) -> np.ndarray:
    """Some inputs for a layer, always the same."""
    draw = np.random.RandomState(0)
    if isinstance(module, eqx.nn.Embedding):
        return np.arange(TOKENS)
    shape = (2, 5, 4) if isinstance(module, eqx.nn.Conv) else (module.in_features,)
    return draw.standard_normal((3, *shape)).astype(np.float32)


def outputs(model, bound, name: str):
    """What the layer of this name gives for :func:`inputs`."""
    x = inputs(part(model, name))
    return jax.vmap(part(bound, name))(jnp.asarray(x))


def arrays_of(model) -> dict[str, np.ndarray]:
    """The arrays of a model by their names, as torch keeps them."""
    flat = jtu.tree_flatten_with_path(eqx.filter(model, eqx.is_array))[0]
    named = {name_of(path): np.asarray(x) for path, x in flat}
    return {
        name: x.T if "c_attn.weight" in name else x.reshape(-1) if "bias" in name else x
        for name, x in named.items()
    }
