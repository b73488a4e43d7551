"""A sparse matrix of fixed places beside a product of thin factors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import nn
from tests.helpers import assert_close, random_low_rank


OUT, IN, RANK, BATCH = 12, 10, 2, 7


def generic(getkey, density=0.2):
    layer = nn.SparsePlusLowRankLinear(IN, OUT, RANK, density=density, key=getkey())
    node = random_low_rank(getkey(), OUT, IN, RANK)
    return eqx.tree_at(lambda layer: layer.weight, layer, node)


def dense_weight(layer):
    """The weight written out entry by entry, in float64."""
    left, right, values = (
        np.asarray(x, np.float64)
        for x in (layer.weight.left, layer.weight.right, layer.values)
    )
    weight = left @ right.T
    for place, v in zip(np.asarray(layer.indices), values, strict=True):
        weight[divmod(place, IN)] += v
    return weight


@pytest.mark.slow
def test_it_is_its_dense_layer(getkey):
    layer = generic(getkey)
    x, weigh = jr.normal(getkey(), (BATCH, IN)), jr.normal(getkey(), (BATCH, OUT))
    assert_close(layer.to_dense().weight, dense_weight(layer))

    @eqx.filter_jit
    def both(layer, x):
        loss = lambda of: jnp.sum(jax.vmap(of[0])(of[1]) * weigh)
        return jax.vmap(layer)(x), eqx.filter_grad(loss)((layer, x))

    y, (grad, dx) = both(layer, x)
    w, x64, g = (
        dense_weight(layer),
        np.asarray(x, np.float64),
        np.asarray(weigh, np.float64),
    )
    full = g.T @ x64
    assert_close(y, x64 @ w.T + np.asarray(layer.bias), condition=10)
    assert_close(dx, g @ w, condition=10)
    assert_close(grad.weight.left, full @ np.asarray(layer.weight.right), condition=10)
    assert_close(grad.weight.right, full.T @ np.asarray(layer.weight.left), condition=10)
    assert_close(grad.values, full.reshape(-1)[np.asarray(layer.indices)], condition=10)
    assert_close(grad.bias, g.sum(0), condition=10)


@pytest.mark.slow
def test_no_dense_matrix_is_kept_and_none_is_made_for_each_input(getkey):
    params, static = eqx.partition(generic(getkey), eqx.is_inexact_array)
    x = jr.normal(getkey(), (BATCH, IN))
    outputs = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    _, pull = jax.vjp(outputs, params, x)
    kept = {leaf.size for leaf in jax.tree.leaves(pull)}
    assert BATCH * IN in kept
    assert OUT * IN not in kept
    program = str(jax.make_jaxpr(jax.grad(lambda p, x: jnp.sum(outputs(p, x))))(params, x))
    assert f"f32[{OUT},{IN}]" in program
    assert f"[{BATCH},{OUT},{IN}]" not in program
    assert f"[{BATCH},{IN},{OUT}]" not in program


def test_the_start(getkey):
    layer = nn.SparsePlusLowRankLinear(30, 20, 3, density=0.05, key=getkey())
    places = np.asarray(layer.indices)
    assert len(places) == 30
    assert np.all(np.diff(places) > 0)
    assert 0 <= places[0] < places[-1] < 600
    assert not np.any(layer.weight.left)
    assert np.all(np.abs(layer.values) <= 30**-0.5)
    assert np.linalg.matrix_rank(np.asarray(layer.to_dense().weight)) > 3


@pytest.mark.slow
def test_stacks_halves_and_files(getkey, tmp_path):
    make = lambda key: nn.SparsePlusLowRankLinear(6, 6, 2, density=0.2, key=key)
    stack = eqx.filter_vmap(make)(jr.split(getkey(), 3))
    arrays, static = eqx.partition(stack, eqx.is_array)

    @jax.jit
    def scanned(x):
        step = lambda x, a: (eqx.combine(a, static)(x), None)
        return jax.lax.scan(step, x, arrays)[0]

    dense, want = stack.to_dense(), jnp.ones(6)
    for k in range(3):
        want = np.asarray(dense.weight[k], np.float64) @ want + np.asarray(dense.bias[k])
    assert_close(scanned(jnp.ones(6)), want, condition=10)
    layer = make(getkey())
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, layer
    )
    y = half(jnp.ones(6, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), layer(jnp.ones(6)), rtol=0.05)
    eqx.tree_serialise_leaves(tmp_path / "layer.eqx", layer)
    like = eqx.filter_eval_shape(make, getkey())
    back = eqx.tree_deserialise_leaves(tmp_path / "layer.eqx", like)
    assert eqx.tree_equal(back, layer)
    plain = nn.densify([layer])[0]
    assert_close(plain(jnp.ones(6)), layer(jnp.ones(6)), condition=10)


@pytest.mark.usefixtures("shapes_unchecked")
def test_what_is_refused(getkey):
    layer = generic(getkey)
    parts = {"values": layer.values, "indices": layer.indices}
    make = nn.SparsePlusLowRankLinear.from_node
    assert eqx.tree_equal(make(layer.weight, layer.bias, **parts), layer)
    with pytest.raises(ValueError, match="takes one input"):
        layer(jnp.ones(OUT))
    with pytest.raises(ValueError, match="density must leave"):
        nn.SparsePlusLowRankLinear(IN, OUT, RANK, density=0.0, key=getkey())
    with pytest.raises(TypeError, match=r"takes a lrjax\.LowRank"):
        make(jnp.ones((OUT, IN)), **parts)
    with pytest.raises(ValueError, match="integer place for each value"):
        make(layer.weight, **{**parts, "indices": layer.indices[1:]})
    with pytest.raises(ValueError, match="needs a bias of shape"):
        make(layer.weight, layer.bias[1:], **parts)
