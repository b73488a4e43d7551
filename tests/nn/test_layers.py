"""Factorized layers are the dense layers of their materialized weight."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import lrjax
from lrjax import nn
from tests.helpers import assert_close, tol


FORMS = ["pair", "svd"]
form = pytest.mark.parametrize("form", FORMS)


def normal(key, *shape):
    """A draw on the host, without a program for each shape."""
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def generic(layer, key):
    """The layer with a weight that is no singular value decomposition."""
    leaves, treedef = jax.tree.flatten(layer)
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype))
    return treedef.unflatten([draw(x) for x in leaves])


@eqx.filter_jit  # one program for all schemes of one dense layer
def value_and_gradient(layer, x, weigh):
    """The output for a batch, and the gradient of its product with ``weigh``."""
    loss = lambda of: jnp.sum(jax.vmap(of[0])(of[1]) * weigh)
    return jax.vmap(layer)(x), eqx.filter_grad(loss)((layer, x))


@eqx.filter_jit
def by_the_chain_rule(node, dense_gradient, fold=lambda kernel: kernel):
    """The gradient of the parts of a node from that of its value, folded."""
    _, pull = jax.vjp(lambda node: node.materialize(), node)
    return pull(fold(dense_gradient))[0]


@pytest.mark.slow
@form
def test_linear_is_its_dense_layer(form, getkey):
    layer = generic(nn.LowRankLinear(7, 5, 3, form=form, key=getkey()), getkey())
    x, weigh = jr.normal(getkey(), (6, 7)), jr.normal(getkey(), (6, 5))
    y, (grad, dx) = value_and_gradient(layer, x, weigh)
    want, (dense, want_dx) = value_and_gradient(layer.to_dense(), x, weigh)
    assert_close(y, want, condition=10)
    assert_close(dx, want_dx, condition=10)
    assert_close(grad.bias, dense.bias)
    assert_close(grad.weight, by_the_chain_rule(layer.weight, dense.weight), condition=10)


@pytest.mark.slow_but("svd")
@form
def test_embedding_is_its_dense_layer(form, getkey):
    layer = generic(nn.LowRankEmbedding(9, 5, 3, form=form, key=getkey()), getkey())
    x, weigh = jr.randint(getkey(), (6,), 0, 9), jr.normal(getkey(), (6, 5))

    def both(layer):
        loss = lambda layer: jnp.sum(jax.vmap(layer)(x) * weigh)
        return jax.vmap(layer)(x), eqx.filter_grad(loss)(layer)

    (y, grad), (want, dense) = map(eqx.filter_jit(both), (layer, layer.to_dense()))
    assert_close(y, want, condition=10)
    assert_close(grad.weight, by_the_chain_rule(layer.weight, dense.weight), condition=10)


SCHEMES = ["inputs", "outputs", "first", "last"]
GEOMETRIES = {
    "1d": dict(num_spatial_dims=1, kernel_size=3, stride=2, padding=1),
    "2d": dict(
        num_spatial_dims=2,
        kernel_size=(3, 2),
        stride=(1, 2),
        padding=((1, 0), (2, 1)),
        dilation=(2, 1),
    ),
    "groups": dict(num_spatial_dims=2, kernel_size=(2, 3), groups=2, padding="SAME"),
    "depthwise": dict(num_spatial_dims=2, kernel_size=3, groups=4, stride=2),
    "lower": dict(num_spatial_dims=2, kernel_size=(2, 4), padding="SAME_LOWER", stride=2),
    "circular": dict(num_spatial_dims=1, kernel_size=3, padding=2, padding_mode="CIRCULAR"),
    "3d": dict(num_spatial_dims=3, kernel_size=2, stride=(1, 2, 1), dilation=(1, 1, 2)),
}


@pytest.mark.slow_but("inputs-1d")
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_conv_is_its_dense_layer(name, scheme, getkey):
    settings = dict(in_channels=4, out_channels=8, scheme=scheme, **GEOMETRIES[name])
    form = FORMS[SCHEMES.index(scheme) % 2]
    make = lambda key: nn.LowRankConv(rank=1, form=form, key=key, **settings)
    layer = generic(make(getkey()), getkey())
    x = normal(getkey(), 2, 4, *(6,) * settings["num_spatial_dims"])
    dense = layer.to_dense()
    weigh = normal(getkey(), *jax.eval_shape(jax.vmap(dense), x).shape)
    y, (grad, dx) = value_and_gradient(layer, x, weigh)
    want, (want_grad, want_dx) = value_and_gradient(dense, x, weigh)
    assert_close(y, want, condition=10)
    assert_close(dx, want_dx, condition=10)
    assert_close(grad.bias, want_grad.bias, condition=10)
    fold = lambda kernel: nn.fold_kernel(kernel, scheme, groups=layer.geometry.groups)
    want = by_the_chain_rule(layer.weight, want_grad.weight, fold)
    assert_close(grad.weight, want, condition=10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folded_kernel_convolves_as_the_kernel_does(scheme, getkey):
    """Against ``lax`` alone: two convolutions written out from the singular vectors."""
    kernel = jr.normal(getkey(), (6, 4, 3, 2))
    x = jr.normal(getkey(), (1, 4, 7, 8))
    matrix = np.asarray(nn.fold_kernel(kernel, scheme), np.float64)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rows = {"inputs": (1, 1), "outputs": (3, 2), "first": (3, 1), "last": (1, 2)}[scheme]
    cols = tuple(k // r for k, r in zip((3, 2), rows, strict=True))
    first = (s[:, None] * vt).reshape(-1, 4, *cols)
    second = np.moveaxis(u.reshape(6, *rows, -1), -1, 1)
    through = lambda x, k: lax.conv(x, jnp.asarray(k, x.dtype), (1, 1), "VALID")
    got = through(through(x, first), second)
    assert_close(got, lax.conv(x, kernel, (1, 1), "VALID"), condition=10)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("groups", [1, 2])
def test_unfolding_undoes_folding(scheme, groups, getkey):
    kernel = jr.normal(getkey(), (6, 4, 3, 2, 5))
    matrix = nn.fold_kernel(kernel, scheme, groups=groups)
    back = nn.unfold_matrix(matrix, kernel.shape, scheme, groups=groups)
    np.testing.assert_array_equal(back, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_tucker_conv_is_its_dense_layer(spatial, getkey):
    ranks = (3, 2) if spatial < 3 else (3, 2, 2, 1, 2)
    make = lambda key: nn.TuckerConv(
        spatial, 4, 6, 3, ranks, stride=2, padding="SAME", key=key
    )
    layer = generic(make(getkey()), getkey())
    x = normal(getkey(), 2, 4, *(5,) * spatial)
    dense = layer.to_dense()
    weigh = normal(getkey(), *jax.eval_shape(jax.vmap(dense), x).shape)
    y, (grad, dx) = value_and_gradient(layer, x, weigh)
    want, (want_grad, want_dx) = value_and_gradient(dense, x, weigh)
    assert_close(y, want, condition=100)
    assert_close(dx, want_dx, condition=100)
    want = by_the_chain_rule(layer.weight, want_grad.weight)
    assert_close(grad.weight, want, condition=100)


def starts(key, rank):
    """Layers at their start beside those of Equinox with the same key, and the matrices."""
    conv = dict(stride=2, padding=1, groups=2)
    fold = lambda kernel: nn.fold_kernel(kernel, "first", groups=2)
    yield (
        nn.LowRankLinear(6, 5, rank, key=key),
        eqx.nn.Linear(6, 5, key=key),
        lambda weight: weight,
    )
    yield (
        nn.LowRankEmbedding(8, 5, rank, form="svd", key=key),
        eqx.nn.Embedding(8, 5, key=key),
        lambda weight: weight,
    )
    yield (
        nn.LowRankConv(2, 6, 2, (5, 2), rank, scheme="first", key=key, **conv),
        eqx.nn.Conv(2, 6, 2, (5, 2), key=key, **conv),
        fold,
    )


@pytest.mark.slow
def test_the_start_is_the_truncated_start_of_the_dense_layer(getkey):
    for layer, dense, fold in starts(getkey(), 2):
        s = np.linalg.svd(np.asarray(fold(dense.weight), np.float64), compute_uv=False)
        error = fold(layer.to_dense().weight) - fold(dense.weight)
        got = np.linalg.norm(error, axis=(-2, -1))
        want = np.sqrt(np.sum(s[..., 2:] ** 2, axis=-1))
        np.testing.assert_allclose(got, want, rtol=tol(dense.weight, condition=10))


def test_at_full_rank_the_start_is_the_dense_layer(getkey):
    for layer, dense, _ in starts(getkey(), 5):
        assert_close(layer.to_dense(), dense, condition=10)


LAYERS = {
    "linear": (lambda key: nn.LowRankLinear(6, 6, 2, key=key), (6,)),
    "linear svd": (lambda key: nn.LowRankLinear(6, 6, 2, form="svd", key=key), (6,)),
    "conv": (
        lambda key: nn.LowRankConv(1, 4, 4, 3, 2, padding="SAME", scheme="last", key=key),
        (4, 5),
    ),
    "grouped": (
        lambda key: nn.LowRankConv(1, 4, 4, 3, 2, padding="SAME", groups=2, key=key),
        (4, 5),
    ),
    "tucker": (
        lambda key: nn.TuckerConv(1, 4, 4, 3, (2, 2), padding="SAME", key=key),
        (4, 5),
    ),
}
layers = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.slow
@layers
def test_a_stack_is_scanned_and_is_no_layer_by_itself(name, getkey):
    make, shape = LAYERS[name]
    stack = eqx.filter_vmap(make)(jr.split(getkey(), 3))
    x = jr.normal(getkey(), shape)
    arrays, static = eqx.partition(stack, eqx.is_array)

    @jax.jit
    def scanned(x):
        return lax.scan(lambda x, a: (eqx.combine(a, static)(x), None), x, arrays)[0]

    want = x
    for k in range(3):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], arrays)
        want = eqx.filter_jit(eqx.combine(one, static))(want)
    assert_close(scanned(x), want)
    with pytest.raises(ValueError, match="is a stack"):
        stack(x)
    dense = eqx.filter_vmap(lambda layer: layer.to_dense())(stack)
    assert_close(stack.to_dense(), dense)


@pytest.mark.slow_but("linear", "linear svd")
@layers
def test_in_bfloat16(name, getkey):
    make, shape = LAYERS[name]
    layer = make(getkey())
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer)
    x = jr.normal(getkey(), shape, jnp.bfloat16)
    y = eqx.filter_jit(half)(x)
    assert y.dtype == jnp.bfloat16
    want = eqx.filter_jit(layer)(x.astype(jnp.float32))
    assert jnp.linalg.norm(y.astype(jnp.float32) - want) < 0.05 * jnp.linalg.norm(want)


@layers
def test_a_file_brings_back_the_layer(name, getkey, tmp_path):
    make, _ = LAYERS[name]
    layer = generic(make(getkey()), getkey())
    eqx.tree_serialise_leaves(tmp_path / "layer.eqx", layer)
    like = eqx.filter_eval_shape(make, getkey())
    back = eqx.tree_deserialise_leaves(tmp_path / "layer.eqx", like)
    assert eqx.tree_equal(back, layer)


@layers
def test_a_key_may_be_given_as_to_the_layers_of_equinox(name, getkey):
    make, shape = LAYERS[name]
    layer, x = make(getkey()), jnp.ones(shape)
    assert_close(layer(x, key=getkey()), layer(x))


@pytest.mark.slow
def test_sequences_and_transforms_for_factors_take_them(getkey):
    """``eqx.nn.Sequential`` hands on keys; a Gram scaling sees the pair, no bias."""
    k1, k2 = jr.split(getkey())
    model = eqx.nn.Sequential(
        [nn.LowRankLinear(6, 4, 2, key=k1), nn.LowRankLinear(4, 3, 2, key=k2)]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = lrjax.scale_by_gram(0.0)
    x = jr.normal(getkey(), (5, 6))
    loss = lambda p: jnp.mean(jax.vmap(eqx.combine(p, static))(x) ** 2)
    grads = jax.grad(loss)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    got, g, w = (tree.layers[0].weight for tree in (updates, grads, params))
    assert_close(updates.layers[0].bias, grads.layers[0].bias)
    gram = np.asarray(w.right.T @ w.right, np.float64)
    want = np.asarray(g.left, np.float64) @ np.linalg.inv(gram)
    assert_close(got.left, want, condition=np.linalg.cond(gram))
