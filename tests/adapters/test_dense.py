"""The product that flattens batch axes: a twin of ``x @ w.T`` under every transform."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax
from lrjax._dense import dense
from tests.helpers import assert_close


def plain(x, w):
    return x @ w.T


def both(f, *args):
    """``f`` of the product and of its twin, each compiled as one program."""
    return [jax.jit(lambda *a, p=p: f(p, *a))(*args) for p in (dense, plain)]


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
@pytest.mark.parametrize("axes", [0, 1])
def test_value_and_gradient_under_nested_vmap(shape, axes, getkey):
    w, x = jr.normal(getkey(), shape), jr.normal(getkey(), (2, 5, shape[1]))

    def f(product, x, w):
        nested = jax.vmap(jax.vmap(product, (0, None)), (axes, None))
        loss = lambda x, w: jnp.sum(jnp.tanh(nested(x, w)) ** 2)
        direct = product(x, w)
        return nested(x, w), direct, jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    got, want = both(f, x, w)
    assert_close(got, want, condition=10)


def test_gradients_for_each_example_and_for_many_weights(getkey):
    ws, x = jr.normal(getkey(), (3, 4, 6)), jr.normal(getkey(), (3, 5, 6))

    def f(product, x, ws):
        loss = lambda w, x: jnp.sum(jnp.tanh(jax.vmap(product, (0, None))(x, w)))
        one_weight = jax.vmap(jax.grad(loss), (None, 0))(ws[0], x)
        one_input = jax.vmap(jax.grad(loss), (0, None))(ws, x[0])
        return one_weight, one_input, jax.vmap(jax.grad(loss))(ws, x)

    got, want = both(f, x, ws)
    assert_close(got, want, condition=10)


def test_forward_mode_second_order_scan_and_checkpoint(getkey):
    w, x = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (2, 5, 3))

    def f(product, x, w):
        def loss(w):
            step = lambda carry, row: (carry + jnp.tanh(product(row, w)).sum(), None)
            return jax.lax.scan(jax.checkpoint(step), 0.0, x)[0]

        hessian_product = jax.jvp(jax.grad(loss), (w,), (w,))
        return jax.jvp(loss, (w,), (w,)), hessian_product

    got, want = both(f, x, w)
    assert_close(got, want, condition=100)


def test_mixed_dtypes_promote(getkey):
    w, x = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (2, 3), jnp.bfloat16)
    assert dense(x, w).dtype == jnp.float32
    assert dense(x, w.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert_close(dense(x, w), plain(x, w))


def test_sharded_inputs(getkey):
    w, x = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (8, 5, 3))
    want = plain(x, w)
    loss = lambda w, x: jnp.sum(dense(x, w) ** 2)
    gradient = jax.grad(lambda w: jnp.sum(plain(x, w) ** 2))(w)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, P("data")))
            y = jax.jit(dense)(placed, w)
            assert y.sharding.spec[0] == "data"
            assert_close(y, want)
            got = jax.jit(jax.grad(loss))(
                jax.device_put(w, NamedSharding(mesh, P())), placed
            )
            assert_close(got, gradient, condition=10)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(dense, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert_close(jax.jit(mapped)(x, w), want)


@pytest.mark.slow
def test_checkpoint_policies_see_every_product(getkey):
    """Saved dots are not computed again: the flops of layer and factors by hand."""
    keys = [getkey() for _ in range(3)]
    layers = [eqx.nn.Linear(64, 64, use_bias=False, key=k) for k in keys]
    adapters = lrjax.adapt(layers, lrjax.LoRA(4), key=getkey())
    params, frozen = lrjax.partition(adapters)
    x = jnp.ones((32, 64))

    def by_hand(layers, adapters):
        def call(layer, own):
            pair = own.pair
            return lambda v: layer.weight @ v + own.scale * (pair.left @ (pair.right.T @ v))

        return [call(layer, adapters[str(i)]) for i, layer in enumerate(layers)]

    def flops(attach, policy):
        def net(params, x):
            for layer in attach(layers, eqx.combine(params, frozen)):
                x = jnp.tanh(jax.vmap(layer)(x))
            return x

        policy = getattr(jax.checkpoint_policies, policy)
        net = jax.checkpoint(net, policy=policy)
        loss = lambda params, x: jnp.sum(net(params, x) ** 2)
        # By the input too: JAX hides a product from policies where no input has a tangent.
        gradient = jax.jit(jax.grad(loss, (0, 1)))
        return gradient.lower(params, x).compile().cost_analysis()["flops"]

    bound, plain = (flops(attach, "dots_saveable") for attach in (lrjax.bind, by_hand))
    assert bound <= 1.01 * plain
    # A thing to see: without saved products the forward pass is computed again.
    assert flops(lrjax.bind, "nothing_saveable") > 1.25 * plain
