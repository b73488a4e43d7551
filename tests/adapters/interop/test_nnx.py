"""Adapters as ``nnx.LoRA`` and as what qwix keeps beside kernels, there and back."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
import qwix
from flax import linen as nn, nnx

import lrjax
from tests.helpers import assert_close


pytestmark = [
    pytest.mark.usefixtures("shapes_unchecked"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
]


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
        self.einsum = nnx.Einsum("nta,hab->nthb", (2, 6, 4), (2, 4), rngs=rngs)
        self.query = nnx.LinearGeneral((2, 4), (4, 2), axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.gelu(block(x))
        return self.query(self.einsum(self.conv(x)))


def numbers(tree, scale=0.3):
    """The tree with other numbers, a leaf at a time."""
    leaves, treedef = jax.tree.flatten(tree)
    new = [scale * jr.normal(jr.key(i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(new)


def apart(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest)(x)


X = jr.normal(jr.key(5), (2, 5, 8))


@pytest.mark.slow
def test_lora_of_nnx_is_the_adapted_model():
    model = Network(nnx.Rngs(0))
    params, call = apart(model)
    made = lrjax.adapt(params, lrjax.LoRA(2), where=r"blocks.*", key=jr.key(1))
    made = numbers(made)
    packed = lrjax.adapters.nnx.pack(model, made)
    want = call(lrjax.materialize(params, made), X)
    assert_close(packed(X), want, condition=1e3)
    assert type(model.blocks[0]) is nnx.Linear  # the model itself is not changed
    base, same = lrjax.adapters.nnx.unpack(packed)
    params, call = apart(base)
    assert_close(call(params, X), model(X))
    assert_close(call(lrjax.materialize(params, same), X), want, condition=1e3)


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_lora_linear_is_taken_apart(use_bias):
    layer = nnx.LoRALinear(4, 3, lora_rank=2, use_bias=use_bias, rngs=nnx.Rngs(0))
    layer.lora.lora_b[...] = jr.normal(jr.key(0), (2, 3))
    plain, adapters = lrjax.adapters.nnx.unpack(layer)
    assert type(plain) is nnx.Linear
    params, call = apart(plain)
    x = jr.normal(jr.key(1), (5, 4))
    assert_close(call(lrjax.merge(params, adapters), x), layer(x), condition=100)


@pytest.mark.slow
def test_packed_factors_train_as_pairs():
    """By the gram of the other factor, as the adapters themselves do."""
    model = Network(nnx.Rngs(0))
    params, call = apart(model)
    made = numbers(lrjax.adapt(params, lrjax.LoRA(2), where=r"blocks.*", key=jr.key(1)))
    packed = lrjax.adapters.nnx.pack(model, made)
    graph, factors, rest = nnx.split(packed, nnx.LoRAParam, ...)
    loss = lambda f: jnp.mean(nnx.merge(graph, f, rest)(X) ** 2)
    tx = lrjax.on_pairs(lrjax.scaled_gd(0.1), lrjax.adapters.nnx.pairs)
    updates, _ = tx.update(jax.grad(loss)(factors), tx.init(factors), factors)
    got = updates["blocks"][0]

    own, frozen = lrjax.partition(made)

    def same(own):
        whole = jax.tree.map(
            lambda a, b: b if a is None else a, own, frozen, is_leaf=lambda v: v is None
        )
        return jnp.mean(call(lrjax.materialize(params, whole), X) ** 2)

    tx = lrjax.scaled_gd(0.1)
    pair = tx.update(jax.grad(same)(own), tx.init(own), own)[0]["blocks.0.kernel"].pair
    scale = made["blocks.0.kernel"].scale
    # With B' = s B the gradient of A is the same and its gram s² times larger; the
    # gradient of B' is that of B over s.
    assert_close(got["lora_a"][...] * scale**2, pair.right, condition=1e5)
    assert_close(got["lora_b"][...] * scale, pair.left.T, condition=1e5)


def test_nnx_refuses_what_it_cannot_hold():
    model = Network(nnx.Rngs(0))
    params, call = apart(model)
    rule = lrjax.adapters.axes_of(call, params, X)
    conv = lrjax.adapt(params, lrjax.LoRA(2), where=r"conv.*", axes=rule, key=jr.key(0))
    with pytest.raises(ValueError, match=r"conv\.kernel is kernel of Conv: leave it out"):
        lrjax.adapters.nnx.pack(model, conv)
    dora = lrjax.adapt(params, lrjax.DoRA(2), where=r"blocks.*", key=jr.key(0))
    with pytest.raises(ValueError, match=r"blocks\.0\.kernel by Magnitude is none"):
        lrjax.adapters.nnx.pack(model, dora)
    with pytest.raises(ValueError, match=r"There is no nnx\.LoRA with a base_module"):
        lrjax.adapters.nnx.unpack(model)
    conv = nnx.Conv(4, 3, (1,), rngs=nnx.Rngs(0))
    around = nnx.LoRA(4, 2, 3, base_module=conv, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"The nnx\.LoRA at the root is around Conv"):
        lrjax.adapters.nnx.unpack(around)


def with_lora(model, x, **options):
    """The model with LoRA by qwix, and numbers in its factors."""
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=5.0)
    model = qwix.apply_lora_to_model(model, provider, x, **options)
    params, call = apart(model)
    is_factor = lambda path: "lora" in jax.tree_util.keystr(path)
    fill = lambda path, v: numbers(v) if is_factor(path) else v
    return jax.tree.map_with_path(fill, params), call


@pytest.mark.slow
def test_qwix_in_nnx():
    """Products, einsums and convolutions: read, merged, and put back."""
    model = Network(nnx.Rngs(0))
    params, call = apart(model)
    rule = lrjax.adapters.axes_of(call, params, X)
    theirs, theirs_call = with_lora(model, X, rngs=nnx.Rngs(1))
    want = theirs_call(theirs, X)
    base, adapters = lrjax.adapters.qwix.unpack(theirs, alpha=5.0, axes=rule)
    assert set(adapters.layers) == set(rule.specs)
    assert_close(call(lrjax.materialize(base, adapters), X), want, condition=1e3)

    empty = jax.tree.map(jnp.zeros_like, theirs)
    empty = jax.tree.map_with_path(
        lambda path, e, t: e if "lora" in jax.tree_util.keystr(path) else t, empty, theirs
    )
    packed = lrjax.adapters.qwix.pack(empty, adapters, alpha=2.0)
    assert_close(packed["conv"]["kernel_lora_a"][...], theirs["conv"]["kernel_lora_a"][...])
    back = lrjax.adapters.qwix.unpack(packed, alpha=2.0, axes=rule)[1]
    same = call(lrjax.materialize(base, back), X)
    assert_close(same, want, condition=1e3)


@pytest.mark.slow
def test_qwix_in_linen_with_a_scanned_stack():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.DenseGeneral(8, axis=(-2, -1))(nn.DenseGeneral((2, 3))(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, keys = {"params": 0}, {"params": True}
            return nn.scan(Block, variable_axes=axes, split_rngs=keys, length=3)()(x, None)[
                0
            ]

    model = Model()
    plain = model.init(jr.key(0), X)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=5.0)
    theirs = qwix.apply_lora_to_model(model, provider)
    made = theirs.init(jr.key(0), X)
    fill = lambda path, v: numbers(v) if "lora" in jax.tree_util.keystr(path) else v
    made = jax.tree.map_with_path(fill, made)
    rule = lrjax.adapters.axes_of(model.apply, plain, X)
    base, adapters = lrjax.adapters.qwix.unpack(made, alpha=5.0, axes=rule)
    assert adapters["params.ScanBlock_0.DenseGeneral_0.kernel"].shape == (3, 8, 6)
    want = theirs.apply(made, X)
    got = model.apply(lrjax.materialize(base, adapters), X)
    assert_close(got, want, condition=1e3)


def test_a_lower_rank_is_filled_up_and_others_start_at_zero():
    params = {"kernel": jnp.ones((4, 3)), "other_lora_b": jnp.ones((4, 3))}
    params |= {"kernel_lora_a": jnp.ones((4, 4)), "kernel_lora_b": jnp.ones((4, 3))}
    params |= {"other": jnp.ones((3, 3)), "other_lora_a": jnp.ones((3, 4))}
    plain = {name: params[name] for name in ("kernel", "other")}
    made = lrjax.adapt(plain, lrjax.LoRA(2), where=["kernel"], key=jr.key(0))
    made = numbers(made)
    packed = lrjax.adapters.qwix.pack(params, made, alpha=3.0)
    a, b = packed["kernel_lora_a"], packed["kernel_lora_b"]
    change = lrjax.merge(plain, made)["kernel"] - plain["kernel"]
    assert_close(3.0 / 4 * a @ b, change, condition=100)
    assert not jnp.any(packed["other_lora_b"])


def test_qwix_refuses_by_path():
    qx = lrjax.adapters.qwix
    one = {"kernel": jnp.ones((4, 3))}
    factors = {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="no parameter whose name ends in _lora_a"):
        qx.unpack(one, alpha=1.0)
    with pytest.raises(ValueError, match=r"missing: \['kernel_lora_b'\]"):
        qx.unpack(one | {"kernel_lora_a": jnp.ones((4, 2))}, alpha=1.0)
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(2, 3\) beside kernel"):
        qx.unpack(one | factors | {"kernel_lora_a": jnp.ones((5, 2))}, alpha=1.0)
    made = lambda kind: lrjax.adapt(one, kind, key=jr.key(0))
    with pytest.raises(ValueError, match="has the rank 3, and qwix put LoRA of "):
        qx.pack(one | factors, made(lrjax.LoRA(3)), alpha=1.0)
    with pytest.raises(ValueError, match="the change at kernel by Magnitude is none"):
        qx.pack(one | factors, made(lrjax.DoRA(2)), alpha=1.0)
    with pytest.raises(ValueError, match="qwix put no LoRA at kernel"):
        qx.pack(one, made(lrjax.LoRA(2)), alpha=1.0)


def test_stacks_of_layers_are_refused_by_path():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)

    layers = stacked(nnx.Rngs(0).split(2))
    with pytest.raises(ValueError, match=r"the root is a stack \(2,\) of layers"):
        lrjax.adapters.nnx.unpack(layers)
