"""What is found at one width holds at another: rates, starts, sizes of activations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import lrjax
from tests.helpers import assert_close, random_low_rank, relative_error


ONES = lambda tree: jax.tree.map(jnp.ones_like, tree)
arrays = lambda model: eqx.filter(model, eqx.is_inexact_array)


class Zoo(eqx.Module):
    """Every kind of layer, of a width and a rank."""

    table: eqx.nn.Embedding
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    stack: eqx.nn.Linear
    kernel: eqx.nn.Conv2d
    thin: lrjax.nn.LowRankLinear
    head: eqx.nn.Linear
    flax: dict

    def __init__(self, width, rank, key):
        keys = iter(jr.split(key, 9))
        self.table = eqx.nn.Embedding(7, width, key=next(keys))
        self.first = eqx.nn.Linear(5, width, key=next(keys))
        self.norm = eqx.nn.LayerNorm(width)
        layer = lambda key: eqx.nn.Linear(width, width, key=key)
        self.stack = eqx.filter_vmap(layer)(jr.split(next(keys), 3))
        self.kernel = eqx.nn.Conv2d(width, 2 * width, 3, key=next(keys))
        self.thin = lrjax.nn.LowRankLinear(width, width, rank, key=next(keys))
        self.head = eqx.nn.Linear(width, 3, key=next(keys))
        kernel = jr.normal(next(keys), (width, 3))
        self.flax = {
            "out": {"kernel": kernel},
            "embed": {"embedding": jnp.ones((7, width))},
        }


def shapes(*settings):
    return jax.eval_shape(lambda: arrays(Zoo(*settings, jr.key(0))))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_each_leaf_has_the_rate_of_its_sides(optimizer):
    """The table of the paper: inputs and vectors, hidden layers, outputs; k = 4."""
    base = shapes(8, 2)
    wide = jax.tree.map(lambda x: jnp.ones(x.shape), shapes(32, 4))
    tx = lrjax.scale_by_width(base, optimizer)
    rates, _ = tx.update(wide, tx.init(wide))
    vector, into, hidden, out = {
        "adam": (1.0, 1.0, 1 / 4, 1 / 4),
        "sgd": (4.0, 4.0, 1.0, 1 / 4),
    }[optimizer]
    through = {"adam": (1 / 2, 1 / 4), "sgd": (4 / 2, 2 / 4)}[optimizer]
    for leaf, want in [
        (rates.table.weight, into),
        (rates.first.weight, into),
        (rates.first.bias, vector),
        (rates.norm.weight, vector),
        (rates.norm.bias, vector),
        (rates.stack.weight, hidden),
        (rates.stack.bias, vector),
        (rates.kernel.weight, hidden),
        (rates.kernel.bias, vector),
        (rates.thin.weight.left, through[0]),
        (rates.thin.weight.right, through[1]),
        (rates.head.weight, out),
        (rates.head.bias, 1.0),
        (rates.flax["out"]["kernel"], out),
        (rates.flax["embed"]["embedding"], into),
    ]:
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, want, np.float32))


@pytest.mark.slow
def test_at_the_width_of_the_base_nothing_is_changed(getkey):
    model = Zoo(8, 2, getkey())
    grads = arrays(model)
    tx = lrjax.scale_by_width(grads)
    assert_close(tx.update(grads, tx.init(grads))[0], grads, rtol=0.0)
    assert_close(arrays(lrjax.nn.scale_init_by_width(model, model)), grads, rtol=1e-6)


def test_adapters_and_other_axes(getkey):
    def pairs(width):
        model = lambda: eqx.nn.MLP(5, 3, width, 2, key=jr.key(0))
        adapt = lambda: lrjax.adapt(model(), lrjax.LoRA(2), key=jr.key(0))
        return jax.eval_shape(lambda: lrjax.partition(adapt())[0])

    wide = jax.tree.map(lambda x: jnp.ones(x.shape), pairs(24))
    tx = lrjax.scale_by_width(pairs(8))
    rates, _ = tx.update(wide, tx.init(wide))
    each = [float(x.ravel()[0]) for x in jax.tree.leaves(rates)]
    np.testing.assert_allclose(each, [1, 1, 1, 1 / 3, 1, 1 / 3], rtol=1e-6)
    # A convolution of Flax: (taps, taps, in, out).
    tree = lambda k: {"conv": {"kernel": jnp.ones((3, 3, 2 * k, 5 * k))}, "none": None}
    spec = lrjax.MatrixSpec(rows=(-1,), cols=(0, 1, 2))
    tx = lrjax.scale_by_width(tree(1), axes=lambda path, shape: spec)
    step, _ = tx.update(tree(4), tx.init(tree(4)))
    np.testing.assert_array_equal(step["conv"]["kernel"][0, 0, 0], np.full(20, 0.25))


# A network with each hidden unit copied k times is the same function.
K = 3


def net(width, ranks, key):
    keys = jr.split(key, 3)
    model = eqx.nn.MLP(5, 3, width, 3, jnp.tanh, key=keys[0])

    def thin(r, key):
        pair = random_low_rank(key, width, width, r, dtype=jnp.result_type(float))
        pair = lrjax.LowRank(pair.left / r**0.5, pair.right / width**0.5)
        return lrjax.nn.LowRankLinear.from_node(pair, jnp.zeros(width))

    layers = lambda m: (m.layers[1], m.layers[2])
    return eqx.tree_at(layers, model, tuple(map(thin, ranks, keys[1:])))


def copied(model):
    """The same function, of hidden layers and one of the ranks K times as wide."""
    out = lambda x: np.repeat(x, K, axis=0)
    into = lambda x: np.repeat(x, K, axis=-1) / K
    pair = lambda left, right: lrjax.LowRank(jnp.asarray(left), jnp.asarray(right))
    thin, through = model.layers[1].weight, model.layers[2].weight
    parts = lambda m: (
        m.layers[0].weight,
        *(m.layers[i].bias for i in range(3)),
        m.layers[1].weight,
        m.layers[2].weight,
        m.layers[3].weight,
    )
    new = (
        out(model.layers[0].weight),
        *(out(model.layers[i].bias) for i in range(3)),
        pair(out(thin.left), out(thin.right) / K),
        pair(into(out(through.left)), np.repeat(out(through.right) / K, K, axis=1)),
        into(model.layers[3].weight),
    )
    return eqx.tree_at(parts, model, jax.tree.map(jnp.asarray, new))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_copies_of_units_stay_copies_and_train_as_the_base(getkey, x64, optimizer):
    """Exact at every step: so the rates are right for each leaf, factors included."""
    base, x, y = (
        net(4, (2, 2), getkey()),
        jr.normal(getkey(), (9, 5)),
        jr.normal(getkey(), (9, 3)),
    )
    wide = copied(base)
    # eps far below the gradients of the copies, which are a K-th.
    moments = {"adam": optax.scale_by_adam(eps=1e-30), "sgd": optax.trace(0.9)}[optimizer]
    scale = lrjax.scale_by_width(arrays(base), optimizer)
    tx = optax.chain(moments, scale, optax.scale(-0.02))

    def outputs(model):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        of = lambda params: jax.vmap(eqx.combine(params, static))(x)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((of(p) - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), of(params)

        run = lambda params: jax.lax.scan(step, (params, tx.init(params)), length=20)
        return np.asarray(jax.jit(run)(params)[1])

    want, got = outputs(base), outputs(wide)
    assert relative_error(want[-1], want[0]) > 0.1
    assert relative_error(got, want) < 1e-10


def coordinates(optimizer, scaled, widths, key, steps=3, seeds=16):
    """How much a few steps change the last hidden activations and the outputs, by width."""
    x, y = jr.normal(key, (16, 5)), jr.normal(jr.fold_in(key, 1), (16, 3))
    moments = {"adam": optax.scale_by_adam(eps=1e-12), "sgd": optax.identity()}[optimizer]

    def activations(model):
        hidden = x
        for layer in model.layers[:-1]:
            hidden = jax.nn.relu(jax.vmap(layer)(hidden))
        return hidden, jax.vmap(model.layers[-1])(hidden)

    def change(key, width):
        model, base = (net(w, (w // 4, w // 4), key) for w in (width, widths[0]))
        if scaled:
            model = lrjax.nn.scale_init_by_width(model, base)
        scale = (
            lrjax.scale_by_width(arrays(base), optimizer) if scaled else optax.identity()
        )
        tx = optax.chain(moments, scale, optax.scale(-0.02))
        params, static = eqx.partition(model, eqx.is_inexact_array)
        loss = lambda p: jnp.mean((activations(eqx.combine(p, static))[1] - y) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        moved = zip(
            activations(eqx.combine(params, static)), activations(model), strict=True
        )
        return [jnp.sqrt(jnp.mean((after - before) ** 2)) for after, before in moved]

    keys = jr.split(key, seeds)
    each = [jax.jit(jax.vmap(lambda k, w=width: change(k, w)))(keys) for width in widths]
    return np.array([[np.mean(x) for x in own] for own in each])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_activations_change_alike_at_all_widths(getkey, optimizer):
    """The coordinate check: of the order of one in width, and not so without."""
    widths, key = (32, 256), getkey()
    scaled = coordinates(optimizer, True, widths, key)
    plain = coordinates(optimizer, False, widths, key)
    growth = lambda sizes: sizes[1] / sizes[0]
    assert np.all((growth(scaled) > 0.4) & (growth(scaled) < 1.8))
    assert growth(plain).max() > 1.8 * growth(scaled).max()


@pytest.mark.slow
def test_every_rate_does_to_a_wide_network_what_it_does_to_a_narrow_one(getkey):
    """A sweep on real digits, from width 32 to 256."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray((x[:512] - x.mean()) / x.std(), jnp.float32), jnp.asarray(y[:512])
    key, powers = getkey(), np.arange(-11.0, -2.0)

    def run(x, y, *, power, seed, width, scaled):
        own = jr.fold_in(key, seed)
        model, base = (eqx.nn.MLP(64, 10, w, 2, key=own) for w in (width, 32))
        model = lrjax.nn.scale_init_by_width(model, base) if scaled else model
        params, static = eqx.partition(model, eqx.is_inexact_array)
        scale = lrjax.scale_by_width(arrays(base)) if scaled else optax.identity()
        tx = optax.chain(optax.scale_by_adam(eps=1e-12), scale, optax.scale(-(2.0**power)))

        def loss(params):
            logits = jax.vmap(eqx.combine(params, static))(x)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), jnp.log(value)

        _, values = jax.lax.scan(step, (params, tx.init(params)), length=20)
        return jnp.mean(values[-5:])

    def curve(width, scaled):
        """The mean log loss at each rate."""
        static = {"width": [width], "scaled": [scaled]}
        grid = {"power": powers, "seed": range(2)}
        out = lrjax.sweep(run, grid, x, y, static=static, progress=False)["result"]
        return np.nan_to_num(out.mean("seed").values.ravel(), nan=9.0)

    base, scaled, plain = curve(32, False), curve(256, True), curve(256, False)
    # Up to the best rate; above it two seeds are rough.
    small = slice(0, base.argmin())
    apart = lambda curve: np.mean(np.abs(curve - base)[small])
    assert apart(scaled) < 0.5 * apart(plain)


@pytest.mark.slow
def test_the_start_has_the_norms_of_a_map_between_unit_entries(getkey):
    """Spectral norms grow as (out/in)^(1/2) for every kind of layer, pairs too."""
    keys = jr.split(getkey(), 5)
    make = lambda width: eqx.filter_vmap(lambda k: net(width, (2, width // 4), k))(keys)
    small, wide = make(32), make(128)
    wide = eqx.filter_vmap(lrjax.nn.scale_init_by_width)(wide, small)
    norm = lambda x: np.linalg.norm(np.asarray(x), 2, axis=(-2, -1)).mean()
    for layer, want in [(0, 2.0), (3, 0.5)]:
        ratio = norm(wide.layers[layer].weight) / norm(small.layers[layer].weight)
        assert want / 1.5 < ratio < want * 1.5
    thin, through = (
        (w.layers[i].weight, s.layers[i].weight)
        for i, w, s in [(1, wide, small), (2, wide, small)]
    )
    for (w, s), left, right in [(thin, 2.0, 0.5), (through, 1.0, 1.0)]:
        assert left / 1.5 < norm(w.left) / norm(s.left) < left * 1.5
        assert right / 1.5 < norm(w.right) / norm(s.right) < right * 1.5


def test_zeros_and_what_is_no_array_stay(getkey):
    tree = lambda n: {"w": jnp.zeros((n, n), jnp.bfloat16), "f": jnp.tanh, "count": 3}
    new = lrjax.nn.scale_init_by_width(tree(8), tree(4))
    assert new["f"] is jnp.tanh
    assert new["count"] == 3
    assert new["w"].dtype == jnp.bfloat16
    assert not jnp.any(new["w"])


def test_what_it_refuses():
    base = {"w": jnp.ones((4, 4)), "stack": jnp.ones((2, 4, 4))}
    tx = lrjax.scale_by_width(base)
    with pytest.raises(ValueError, match=r"and v of shape \(4,\) is not in it"):
        tx.init({"v": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"and w of shape \(4,\) has shape \(4, 4\) there"):
        tx.init({"w": jnp.ones(4)})
    with pytest.raises(ValueError, match="another number of them"):
        tx.init({**base, "stack": jnp.ones((3, 4, 4))})
    svd = {"w": lrjax.svd(lrjax.LowRank(jnp.ones((4, 1)), jnp.ones((4, 1))))}
    with pytest.raises(ValueError, match="found a SVDForm at w"):
        lrjax.scale_by_width(svd)
