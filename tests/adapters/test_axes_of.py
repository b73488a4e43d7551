"""Which axes are a matrix, read off the programs of Flax NNX, Linen, Haiku and others."""

import haiku as hk
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import linen as nn, nnx

import lrjax
from lrjax.adapters import axes_of
from tests.helpers import assert_close


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def sides(rule):
    return {path: (spec.rows, spec.cols) for path, spec in rule.specs.items()}


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.linear = nnx.Linear(8, 5, rngs=rngs)
        self.conv = nnx.Conv(5, 3, (3,), rngs=rngs)
        self.einsum = nnx.Einsum("nta,hab->nthb", (2, 3, 4), (2, 4), rngs=rngs)

    def __call__(self, ids):
        h = self.norm(self.attention(self.embed(ids)))
        return self.einsum(self.conv(self.linear(h))), self.embed.attend(h)


def test_nnx():
    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)
    call = lambda params, ids: nnx.merge(graph, params, rest)(ids)
    ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    rule = axes_of(call, params, ids)
    heads = ((1, 2), (0,))
    assert sides(rule) == {
        "attention.key.kernel": heads,
        "attention.out.kernel": ((2,), (0, 1)),
        "attention.query.kernel": heads,
        "attention.value.kernel": heads,
        "conv.kernel": ((2,), (1, 0)),
        "einsum.kernel": ((0, 2), (1,)),
        "embed.embedding": ((1,), (0,)),  # its lookup comes first, the tied head agrees
        "linear.kernel": ((1,), (0,)),
    }


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.MultiHeadDotProductAttention(2)(x)
        return nn.Dense(8)(nn.gelu(nn.remat(nn.Dense)(12)(h))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes, keys = {"params": 0}, {"params": True}
        x, _ = nn.scan(Block, variable_axes=axes, split_rngs=keys, length=3)()(x, None)
        return nn.DenseGeneral((2, 3), axis=(-2, -1))(x.reshape(4, 2, 4))


def test_linen_scanned_and_rematerialized():
    """The axis that is scanned stacks layers; from shapes alone."""
    model, x = Scanned(), jnp.ones((4, 8))
    params = jax.eval_shape(model.init, jr.key(0), x)
    found = sides(axes_of(model.apply, params, x))
    block, attention = "params.ScanBlock_0", "MultiHeadDotProductAttention_0"
    assert found == {
        "params.DenseGeneral_0.kernel": ((2, 3), (0, 1)),
        f"{block}.CheckpointDense_0.kernel": ((2,), (1,)),
        f"{block}.Dense_0.kernel": ((2,), (1,)),
        f"{block}.{attention}.out.kernel": ((3,), (1, 2)),
        **{
            f"{block}.{attention}.{name}.kernel": ((2, 3), (1,))
            for name in ("query", "key", "value")
        },
    }


def test_haiku():
    def model(ids):
        x = hk.Conv2D(3, 3)(hk.Embed(9, 8)(ids)[..., None])
        cell = hk.LSTM(5)
        state = cell.initial_state(2)
        x, _ = hk.dynamic_unroll(cell, x.reshape(2, 4, -1).swapaxes(0, 1), state)
        return hk.Linear(6)(x)

    network = hk.without_apply_rng(hk.transform(model))
    ids = jnp.ones((2, 4), jnp.int32)
    params = jax.eval_shape(network.init, jr.key(0), ids)
    assert sides(axes_of(network.apply, params, ids)) == {
        "conv2_d.w": ((3,), (2, 0, 1)),
        "embed.embeddings": ((1,), (0,)),
        "linear.w": ((1,), (0,)),
        "lstm/linear.w": ((1,), (0,)),
    }


FORMS = {
    "bi,io->bo": (5, 7),
    "bi,oi->bo": (7, 5),
    "bxy,xoyp->bop": (2, 3, 4, 2),
    "bei,eoi->beo": (3, 4, 5),
}


@pytest.mark.slow_but("bi,io->bo", "bi,oi->bo")
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_a_map_from_inputs_to_outputs(form):
    """Along the axes found, the change of an output is ``left rightᵀ`` of the input."""
    names, letters = form.split("->")[0].split(",")
    sizes = dict(zip(letters, FORMS[form], strict=True))
    x = jr.normal(jr.key(0), [6 if c == "b" else sizes[c] for c in names])
    params = {"w": jr.normal(jr.key(1), FORMS[form])}
    call = lambda params, x: jnp.einsum(form, x, params["w"])
    rule = axes_of(call, params, x)
    made = lrjax.adapt(params, lrjax.LoRA(1), where=["w"], axes=rule, key=jr.key(2))
    made = jax.tree.map(lambda v: jr.normal(jr.key(v.size), v.shape), made)
    change = call(lrjax.materialize(params, made), x) - call(params, x)
    (pair, scale), stack = made["w"].factors(), made["w"].shape[:-2]
    inputs = np.asarray(x).reshape(6, *stack, -1)
    outputs = np.einsum("b...i,...ir,...or->b...o", inputs, pair.right, pair.left)
    outputs = np.asarray(scale)[..., None] * outputs
    assert_close(change, outputs.reshape(change.shape), condition=1e3)


def test_followed_through_what_keeps_the_axes():
    """Casts, transposes, slices of a fused projection, a weight that is normalized."""

    def call(params, x):
        fused = params["fused"].astype(jnp.bfloat16).T
        query, value = fused[:, :4], fused[:, 4:]
        lengths = jnp.linalg.norm(params["normed"], axis=1, keepdims=True)
        h = x.astype(jnp.bfloat16) @ query @ (params["normed"] / lengths)
        joined = params["joined"].reshape(8, 6).reshape(2, 4, 6)
        return h + x @ value, jnp.einsum("bd,hdk->bhk", x[:, :4], joined)

    params = {
        "fused": jnp.ones((8, 8)),
        "normed": jnp.ones((4, 4)),
        "joined": jnp.ones((2, 4, 2, 3)),
    }
    assert sides(axes_of(call, params, jnp.ones((3, 8)))) == {
        "fused": ((0,), (1,)),
        "normed": ((1,), (0,)),
        "joined": ((0, 2, 3), (1,)),
    }


def test_what_is_not_told_is_not_guessed():
    """A product of two parameters, a bias, a table that is added."""

    def call(params, x):
        kernel = params["u"] @ params["v"]
        return (x + params["position"]) @ kernel @ params["w"] + params["bias"][None]

    sizes = {"u": (4, 2), "v": (2, 4), "position": (3, 4), "w": (4, 4), "bias": (4,)}
    params = {name: jnp.ones(size) for name, size in sizes.items()}
    assert sides(axes_of(call, params, jnp.ones((3, 4)))) == {"w": ((1,), (0,))}


def test_uses_that_do_not_agree_are_refused_by_path():
    def call(params, x):
        return jnp.einsum("bi,ijk->bjk", x, params["core"]), jnp.einsum(
            "bi,bj,ijk->bk", x, x, params["core"]
        )

    params = {"core": jnp.ones((4, 4, 5)), "w": jnp.ones((4, 5))}
    rule = axes_of(lambda p, x: (call(p, x), x @ p["w"]), params, jnp.ones((3, 4)))
    assert rule.several == ("core",)
    with pytest.raises(ValueError, match=r"core of shape \(4, 4, 5\) meets the inputs"):
        lrjax.adapt(params, lrjax.LoRA(1), where=["core"], axes=rule, key=jr.key(0))


def test_a_program_that_does_not_use_them_is_refused():
    with pytest.raises(ValueError, match="found no parameter that meets the inputs"):
        axes_of(lambda params, x: 2 * x, {"w": jnp.ones((4, 4))}, jnp.ones(4))


@pytest.mark.slow
def test_an_adapter_of_linen_trains():
    """Told by the rule, a layer of attention fits a change of low rank of its own."""
    model, x = nn.MultiHeadDotProductAttention(2), jr.normal(jr.key(0), (6, 5, 8))
    params = model.init(jr.key(1), x)
    rule = axes_of(model.apply, params, x)
    aim = lrjax.adapt(params, lrjax.LoRA(1), axes=rule, key=jr.key(2))
    aim = jax.tree.map(lambda v: 0.3 * jr.normal(jr.key(v.size), v.shape), aim)
    want = model.apply(lrjax.materialize(params, aim), x)
    made = lrjax.adapt(params, lrjax.LoRA(2), axes=rule, key=jr.key(3))
    own, frozen = lrjax.partition(made)
    tx = lrjax.scaled_adamw(3e-2)

    def loss(own):
        adapters = jax.tree.map(
            lambda a, b: b if a is None else a, own, frozen, is_leaf=lambda v: v is None
        )
        got = model.apply(lrjax.materialize(params, adapters), x)
        return jnp.mean((got - want) ** 2)

    def step(carry, _):
        own, state = carry
        value, grads = jax.value_and_grad(loss)(own)
        updates, state = tx.update(grads, state, own)
        return (jax.tree.map(jnp.add, own, updates), state), value

    @jax.jit
    def train(own):
        return jax.lax.scan(step, (own, tx.init(own)), length=150)[1]

    values = np.asarray(train(own))
    assert values[-1] < 0.02 * values[0]
