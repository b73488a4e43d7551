"""Every layer: the bound call, the merged layer and their gradients agree."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.adapters.models import everything, randomized
from tests.helpers import assert_close, tol


LAYERS = {
    "linear": (lambda k: eqx.nn.Linear(5, 7, key=k), (5,)),
    "linear without bias": (lambda k: eqx.nn.Linear(5, 7, use_bias=False, key=k), (5,)),
    "linear of scalars": (lambda k: eqx.nn.Linear("scalar", "scalar", key=k), ()),
    "linear to a scalar": (lambda k: eqx.nn.Linear(3, "scalar", key=k), (3,)),
    "conv1d": (
        lambda k: eqx.nn.Conv1d(4, 6, 3, stride=2, padding="SAME", key=k),
        (4, 9),
    ),
    "conv2d": (lambda k: eqx.nn.Conv2d(4, 6, (3, 2), padding=1, key=k), (4, 6, 5)),
    "conv2d dilated, circular": (
        lambda k: eqx.nn.Conv2d(
            2, 3, 3, dilation=2, padding=2, padding_mode="CIRCULAR", key=k
        ),
        (2, 7, 6),
    ),
    "conv2d in groups": (lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, key=k), (4, 5, 5)),
    "conv2d depthwise": (
        lambda k: eqx.nn.Conv2d(4, 8, 3, groups=4, use_bias=False, key=k),
        (4, 5, 5),
    ),
    "conv3d": (lambda k: eqx.nn.Conv3d(2, 3, 2, key=k), (2, 3, 4, 3)),
    "embedding": (lambda k: eqx.nn.Embedding(9, 4, key=k), None),
}


def build(name, key):
    make, shape = LAYERS[name]
    km, ka, kr, kx = jr.split(key, 4)
    layer = make(km)
    kind = lrjax.LoRA(rank=2, alpha=3.0)
    start = lrjax.adapt(layer, kind, where=everything, key=ka)
    x = jnp.int32(5) if shape is None else jr.normal(kx, shape)
    return layer, start, randomized(start, kr), x


@pytest.mark.slow_but("conv2d depthwise")
@pytest.mark.parametrize("name", LAYERS)
def test_bound_and_merged_agree_in_value_and_gradient(name, getkey):
    @eqx.filter_jit  # one program a layer: compiling is what takes the time
    def run(key):
        layer, start, adapters, x = build(name, key)
        params, frozen = lrjax.partition(adapters)

        def loss(params, attach):
            y = attach(layer, eqx.combine(params, frozen))(x)
            return jnp.sum((y - layer(x) - 1) ** 2), y

        both = [
            jax.value_and_grad(loss, has_aux=True)(params, attach)
            for attach in (lrjax.bind, lrjax.merge)
        ]
        change = lrjax.merge(layer, adapters).weight - layer.weight
        return layer(x), lrjax.bind(layer, start)(x), both, adapters.layers[""], change

    y, at_start, (bound, merged), adapter, change = run(getkey())
    assert_close(at_start, y)
    assert_close(bound, merged, condition=100)
    assert np.any(bound[0][1] != y)

    pair, scale = adapter.factors()
    assert scale == 1.5
    want = 1.5 * np.asarray(pair.left) @ np.asarray(pair.right).T
    want = want.T if name == "embedding" else want
    assert_close(change, want.reshape(change.shape), condition=10)


@pytest.mark.slow
def test_conv_factors_are_a_thin_convolution_and_a_pointwise_one(getkey):
    layer, _, adapters, x = build("conv2d", getkey())
    pair, scale = adapters.layers[""].factors()
    thin = eqx.nn.Conv2d(4, 2, (3, 2), padding=1, use_bias=False, key=getkey())
    thin = eqx.tree_at(lambda c: c.weight, thin, pair.right.T.reshape(2, 4, 3, 2))
    point = eqx.nn.Conv2d(2, 6, 1, use_bias=False, key=getkey())
    point = eqx.tree_at(lambda c: c.weight, point, pair.left.reshape(6, 2, 1, 1))
    assert_close(
        lrjax.bind(layer, adapters)(x), layer(x) + scale * point(thin(x)), condition=10
    )


def test_subclass_with_its_own_call_is_adapted_through_its_weight(getkey):
    class Doubled(eqx.nn.Linear):
        def __call__(self, x, *, key=None):
            return jnp.tanh(2 * (self.weight @ x))

    layer = Doubled(5, 7, key=getkey())
    adapters = lrjax.adapt(layer, lrjax.LoRA(rank=2), key=getkey())
    adapters = randomized(adapters, getkey())
    x = jr.normal(getkey(), (5,))
    assert_close(lrjax.bind(layer, adapters)(x), lrjax.merge(layer, adapters)(x))
    assert_close(
        lrjax.bind(layer, adapters, key=getkey())(x), lrjax.merge(layer, adapters)(x)
    )
    drops = lrjax.adapt(layer, lrjax.LoRA(rank=2, dropout=0.1), key=getkey())
    with pytest.raises(ValueError, match="Doubled has a __call__ of its own"):
        lrjax.bind(layer, drops, key=getkey())


@pytest.mark.slow_but("linear")
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_bfloat16_model_with_float32_adapters(name, getkey):
    make, shape = LAYERS[name]
    layer = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if eqx.is_array(a) else a, make(getkey())
    )
    x = jnp.int32(3) if shape is None else jr.normal(getkey(), shape, jnp.bfloat16)
    for dtype, expected in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        kind = lrjax.LoRA(rank=2, dtype=dtype)
        adapters = lrjax.adapt(layer, kind, where=everything, key=getkey())
        adapters = randomized(adapters, getkey())
        assert adapters.layers[""].pair.dtype == expected
        assert adapters.layers[""].scale.dtype == jnp.float32
        y, merged = lrjax.bind(layer, adapters)(x), lrjax.merge(layer, adapters)
        assert y.dtype == merged.weight.dtype == jnp.bfloat16
        assert_close(y, merged(x), rtol=tol(y))


def test_merge_rounds_once(getkey):
    layer = eqx.nn.Linear(32, 32, dtype=jnp.bfloat16, key=getkey())
    adapters = lrjax.adapt(layer, lrjax.LoRA(rank=4, alpha=1.0), key=getkey())
    adapters = randomized(adapters, getkey())
    pair, scale = adapters.layers[""].factors()
    left, right = (np.asarray(f, np.float32) for f in (pair.left, pair.right))
    exact = np.asarray(layer.weight, np.float32) + np.float32(scale) * (left @ right.T)
    half_an_ulp = float(jnp.finfo(jnp.bfloat16).eps) / 2
    merged = np.asarray(lrjax.merge(layer, adapters).weight, np.float32)
    assert np.all(np.abs(merged - exact) <= half_an_ulp * np.abs(exact) * 1.001 + 1e-6)
