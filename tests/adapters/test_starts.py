"""Where the factors of LoRA start: each against its paper, on every kind of layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import adapt, assert_same, merge
from tests.helpers import assert_close, relative_error, tol, with_spectrum
from tests.reference import inits as reference


R, ALPHA = 2, 3.0
SCALE = ALPHA / R
PLAIN = ("default", "gaussian", "orthogonal", "small", "pissa", "milora", "olora")
ALONG_GRADIENTS = ("lora_ga", "lora_one", "spectral")
ALONG_INPUTS = ("eva", "corda", "corda_kpm")
RESIDUAL = ("pissa", "milora", "olora", "lora_ga", "corda", "corda_kpm")
SHAPES = {"stack": (3, 8, 6), "conv": (6, 8), "table": (5, 9)}


def f64(x):
    return np.asarray(x, np.float64)


def product(pair):
    return f64(pair.left) @ f64(pair.right).T


class Layers(eqx.Module):
    """A stack, a grouped convolution and a table with well separated singular values."""

    stack: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    table: eqx.nn.Embedding

    def __init__(self, key, dtype=jnp.float32):
        keys = iter(jr.split(key, 8))
        # So that each of them has singular vectors of its own.
        weight = lambda m, n: with_spectrum(next(keys), m, n, jnp.arange(min(m, n), 0, -1))
        linear = eqx.nn.Linear(6, 8, key=next(keys))
        self.stack = eqx.tree_at(
            lambda x: (x.weight, x.bias),
            linear,
            (jnp.stack([weight(8, 6) / 6 for _ in range(3)]), jnp.zeros((3, 8))),
        )
        conv = eqx.nn.Conv2d(4, 6, 2, groups=2, key=next(keys))
        self.conv = eqx.tree_at(lambda x: x.weight, conv, weight(6, 8).reshape(6, 2, 2, 2))
        self.table = eqx.nn.Embedding(weight=weight(9, 5))
        for name in ("stack", "conv", "table"):
            cast = lambda x: x.astype(dtype)
            setattr(self, name, jax.tree.map(cast, getattr(self, name)))

    def __call__(self, x):
        arrays, static = eqx.partition(self.stack, eqx.is_array)
        step = lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)[:6]), None)
        x, _ = jax.lax.scan(step, x, arrays)
        image = jnp.tile(x[:4, None, None], (1, 3, 3))
        return self.conv(image).mean((1, 2)), self.table(jnp.array(3))


@jax.jit
def gradients(key):
    """In the place of gradients: matrices with singular values far apart."""
    found = {}
    for path, (*stack, m, n) in SHAPES.items():
        keys = jr.split(jr.fold_in(key, len(found)), stack or (1,))
        one = lambda k, m=m, n=n: with_spectrum(k, m, n, 2.0 ** -jnp.arange(min(m, n)))
        found[path] = jax.vmap(one)(keys).reshape(*stack, m, n)
    return found


@jax.jit
def rows_of(key):
    """Inputs with a mean, and variances far apart."""
    return {
        path: 1 + jr.normal(key, (*stack, 40, n)) @ jnp.diag(1.5 ** -jnp.arange(n))
        for path, (*stack, _, n) in SHAPES.items()
    }


@jax.jit
def statistics(rows):
    count = lambda x: jnp.full(x.shape[:-2], float(x.shape[-2]))
    return {
        path: room.InputStatistic(
            x.mT @ x, jnp.sum(x, -2), jnp.sum(x**2, (-2, -1)), count(x)
        )
        for path, x in rows.items()
    }


@eqx.filter_jit
def started(model, names, key):
    """Adapters of many starts, the output of the model, and theirs."""
    adapters, where = {}, everything_but_biases
    along, inputs = gradients(jr.key(3)), statistics(rows_of(jr.key(4)))
    for name in names:
        kind = lrjax.LoRA(R, ALPHA, init=name)
        data = (
            along if name in ALONG_GRADIENTS else inputs if name in ALONG_INPUTS else None
        )
        adapters[name] = lrjax.adapt(model, kind, where=where, key=key, data=data)
    x = jnp.linspace(-1, 1, 6).astype(model.conv.weight.dtype)
    return adapters, model(x), {k: lrjax.bind(model, a)(x) for k, a in adapters.items()}


@pytest.fixture(scope="module")
def single():
    """All starts on one model of fixed numbers: what they are is told exactly."""
    model = eqx.filter_jit(Layers)(jr.key(1))
    return model, *started(model, PLAIN + ALONG_GRADIENTS + ALONG_INPUTS, jr.key(2))


def everything_but_biases(path, layer):
    return not hasattr(layer, "ndim")


def weights(model):
    """The matrices of the layers by path."""
    return {
        "stack": model.stack.weight,
        "conv": model.conv.weight.reshape(6, -1),
        "table": model.table.weight.T,
    }


def each(*trees):
    """Trees of every matrix by path, of a stack one after the other."""
    for path, (*stack, _, _) in SHAPES.items():
        own = [tree[path] for tree in trees]
        if stack:
            yield from (
                jax.tree.map(lambda x, i=i: jnp.asarray(np.asarray(x)[i]), own)
                for i in range(*stack)
            )
        else:
            yield own


def pairs(adapters):
    return {path: adapter.pair for path, adapter in adapters.layers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN + ALONG_GRADIENTS + ALONG_INPUTS)
def test_starts_as_the_model_on_every_kind_of_layer(name, single):
    _, adapters, plain, bound = single
    # Products of small factors are a millionth; all others cancel to rounding, but one.
    same = relative_error(bound[name][0], plain[0]) < tol(plain[0], condition=100)
    assert same == (name != "lora_one")
    for adapter in adapters[name].layers.values():
        assert_same(adapter.start, adapter.pair if name in RESIDUAL else None)
        assert np.any(adapter.pair.left) or np.any(adapter.pair.right)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("pissa", lambda w: reference.pissa(w, R, SCALE)),
        ("milora", lambda w: reference.milora(w, R, SCALE)),
        ("olora", lambda w: reference.olora(w, R)),
    ],
)
def test_parts_of_the_weight(name, want, single):
    model, adapters, *_ = single
    for pair, weight in each(pairs(adapters[name]), weights(model)):
        b, a = want(f64(weight))
        np.testing.assert_allclose(product(pair), b @ a, atol=1e-4)
        grams = np.diag(f64(pair.left).T @ f64(pair.left)), np.diag(b.T @ b)
        np.testing.assert_allclose(*grams, atol=1e-4)


def test_along_the_gradient(single):
    _, adapters, *_ = single
    spans = lambda b, a: (b @ b.T, a.T @ a)
    got = lambda pair: (f64(pair.left), f64(pair.right).T)
    found = [pairs(adapters[name]) for name in ALONG_GRADIENTS]
    for g, disjoint, step, small in each(gradients(jr.key(3)), *found):
        want = reference.lora_ga(f64(g), R, 16.0)
        assert_close(spans(*got(disjoint)), spans(*want), rtol=1e-4)
        want = reference.lora_one(f64(g), R, 128.0)
        assert relative_error(product(step), want[0] @ want[1]) < 1e-4
        assert_close(spans(*got(step)), spans(*want), rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(product(step), 2), 1 / 128, rtol=1e-4)
        u, _, vt = np.linalg.svd(f64(g))
        assert relative_error(product(small), -1e-6 * u[:, :R] @ vt[:R]) < 1e-4


def test_along_the_inputs(single):
    model, adapters, *_ = single
    found = [pairs(adapters[name]) for name in ALONG_INPUTS]
    for rows, w, eva, used, unused in each(rows_of(jr.key(4)), weights(model), *found):
        rows, w = f64(rows), f64(w)
        directions, _ = reference.eva(rows, R)
        a = f64(eva.right).T
        assert not np.any(eva.left)
        assert_close(a.T @ a, directions.T @ directions, rtol=1e-2)
        np.testing.assert_allclose(a @ a.T, np.eye(R), atol=1e-5)
        moment = rows.T @ rows / len(rows)
        for pair, kpm in ((used, False), (unused, True)):
            b, a = reference.corda(w, moment, R, SCALE, kpm)
            assert relative_error(product(pair), b @ a) < 2e-2


@eqx.filter_jit
def derivative(model, adapters, batch):
    """How the weight moves by a gradient step of the factors, per learning rate."""
    params, frozen = lrjax.partition(adapters)
    of = lambda params: loss(lrjax.bind(model, eqx.combine(params, frozen)), batch)
    grads = jax.grad(of)(params)
    weight = lambda params: lrjax.merge(model, eqx.combine(params, frozen)).weight
    return jax.jvp(weight, (params,), (jax.tree.map(jnp.negative, grads),))[1]


def loss(model, batch):
    return jnp.mean((jax.vmap(model)(batch[:, :6]) - batch[:, 6:]) ** 2)


@pytest.mark.slow
def test_first_step_from_lora_ga_is_the_best_of_twice_the_rank(getkey):
    """And eight columns of the gradient do as well as all of it."""
    layer = eqx.nn.Linear(6, 8, key=getkey())
    batches = jr.normal(getkey(), (2, 30, 14)) @ jnp.diag(1.5 ** -jnp.arange(14))
    key, where = getkey(), [""]
    whole = room.gradient_statistics(loss, layer, batches, where=where)[""]
    for sketch in ({}, {"rank": 6, "key": getkey()}):
        data = {"": whole}
        if sketch:
            data = room.gradient_statistics(loss, layer, batches, where=where, **sketch)
        kind = lrjax.LoRA(R, ALPHA, init="lora_ga")
        adapters = adapt(layer, kind, key=key, data=data)
        got = derivative(layer, adapters, batches.reshape(-1, 14))
        u, values, vt = np.linalg.svd(f64(whole), full_matrices=False)
        best = (u[:, : 2 * R] * values[: 2 * R]) @ vt[: 2 * R]
        size = SCALE**2 * 8**0.5 / 16
        assert relative_error(got, -size * best) < 1e-2


@pytest.mark.slow
def test_factors_from_one_step_stay_in_the_span_of_the_target(getkey):
    """In a linear model all gradients have the columns of the missing change."""
    goal = jr.normal(getkey(), (8, R)) @ jr.normal(getkey(), (R, 6))
    layer = eqx.nn.Linear(6, 8, use_bias=False, key=getkey())
    x = jr.normal(getkey(), (40, 6))
    batch = jnp.concatenate([x, x @ (layer.weight + goal).T], axis=1)
    data = room.gradient_statistics(loss, layer, [batch], where=[""])

    @eqx.filter_jit
    def train(adapters):
        def step(_, adapters):
            params, frozen = lrjax.partition(adapters)
            of = lambda p: loss(lrjax.bind(layer, eqx.combine(p, frozen)), batch)
            grads = jax.grad(of)(params)
            params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
            return eqx.combine(params, frozen)

        return jax.lax.fori_loop(0, 50, step, adapters)

    span = np.linalg.qr(f64(goal) @ np.eye(6, R))[0]
    outside = {}
    for name in ("lora_one", "spectral", "orthogonal"):
        kind = lrjax.LoRA(R, init=name)
        own = data if name in ALONG_GRADIENTS else None
        left = f64(train(adapt(layer, kind, key=getkey(), data=own))[""].pair.left)
        outside[name] = np.linalg.norm(left - span @ (span.T @ left)) / np.linalg.norm(left)
    assert max(outside["lora_one"], outside["spectral"]) < 1e-4
    assert outside["orthogonal"] > 1e-3


def test_lora_sb_starts_at_the_projected_first_step_of_adam(getkey):
    layer, rate = eqx.nn.Linear(6, 8, key=getkey()), 0.01
    signs = jnp.sign(jr.normal(getkey(), (8, 6)))
    kind = room.LoRASB(R, learning_rate=rate)
    for size in (1.0, 1e-3):  # of a gradient only the signs count
        adapters = adapt(layer, kind, key=getkey(), data={"": size * signs})
        u, core, vt = reference.lora_sb(f64(signs), R, rate)
        change = f64(merge(layer, adapters).weight) - f64(layer.weight)
        values = np.linalg.svd(f64(signs), compute_uv=False)
        if values[R - 1] - values[R] > 1e-2:
            np.testing.assert_allclose(change, u @ core @ vt, atol=1e-5)
        left, right = f64(adapters[""].pair.left), f64(adapters[""].pair.right)
        np.testing.assert_allclose(
            f64(adapters[""].core), left.T @ (-rate * f64(signs)) @ right, atol=1e-6
        )
    thin = lrjax.LowRank(jnp.ones((8, 1)), jnp.ones((6, 1)))
    with pytest.raises(TypeError, match="without rank="):
        lrjax.adapt(layer, kind, key=getkey(), data={"": thin})


@pytest.mark.slow
def test_half_precision_models_start_as_they_are(getkey):
    half, names = jnp.bfloat16, ("pissa", "orthogonal")
    adapters, plain, bound = started(
        eqx.filter_jit(Layers)(jr.key(1), half), names, getkey()
    )
    for name in names:
        assert all(a.pair.dtype == half for a in adapters[name].layers.values())
        for got, want in zip(bound[name], plain, strict=True):
            gap = np.abs(f64(got) - f64(want)).max()
            assert gap < tol(want) * (np.abs(f64(want)).max() + 1)


@pytest.mark.slow
def test_gaussian_has_the_deviation_of_peft(getkey):
    layer = eqx.nn.Linear(400, 30, key=getkey())
    adapters = lrjax.adapt(layer, lrjax.LoRA(10, init="gaussian"), key=getkey())
    pair = adapters[""].pair
    assert not np.any(pair.left)
    # 4,000 normal numbers: five standard errors of their deviation are six percent.
    np.testing.assert_allclose(np.std(pair.right), 1 / 10, rtol=0.06)
    other = lrjax.LoRA(10, init="gaussian", train="right")
    pair = lrjax.adapt(layer, other, key=getkey())[""].pair
    assert np.any(pair.left)
    assert not np.any(pair.right)


@pytest.mark.slow
def test_both_orthogonal_factors_have_a_gradient_at_once(getkey):
    layer, x = eqx.nn.Linear(6, 8, key=getkey()), jr.normal(getkey(), (6,))
    adapters = lrjax.adapt(layer, lrjax.LoRA(R, init="orthogonal"), key=getkey())
    loss = lambda adapters: jnp.sum(lrjax.bind(layer, adapters)(x) ** 2)
    grads = jax.jit(jax.grad(loss))(adapters)[""].pair
    assert np.any(grads.left)
    assert np.any(grads.right)
    with pytest.raises(ValueError, match="even rank"):
        lrjax.adapt(layer, lrjax.LoRA(3, init="orthogonal"), key=getkey())


class Corner(room.Start):
    """A user's own: the first coordinates, taken off again."""

    size: float
    residual = True

    def pair(self, site, rank, *, scale, train, key, data):
        m, n = site.shape
        return lrjax.LowRank(self.size * jnp.eye(m, rank), jnp.eye(n, rank))


@pytest.mark.slow
def test_a_start_of_ones_own_and_around_it_lengths(getkey):
    layer, x = eqx.nn.Linear(6, 8, key=getkey()), jr.normal(getkey(), (6,))
    kind = lrjax.adapters.WithMagnitude(lrjax.LoRA(R, init=Corner(0.5)))
    adapters = lrjax.adapt(layer, kind, key=getkey())
    assert_close(lrjax.bind(layer, adapters)(x), layer(x), condition=10)
    assert relative_error(adapters[""].inner.start.left, 0.5 * np.eye(8, R)) == 0


def test_a_sweep_over_the_size_is_one_program(getkey):
    layer, key = eqx.nn.Linear(6, 8, key=getkey()), getkey()

    @jax.jit
    @jax.vmap
    def left(std):
        kind = lrjax.LoRA(R, init=room.SmallStart(std))
        return lrjax.adapt(layer, kind, key=key)[""].pair.left

    two = left(jnp.array([1e-3, 1e-2]))
    assert_close(10 * two[0], two[1])


@pytest.mark.slow
def test_unknown_names_and_ranks_that_do_not_fit_are_refused(getkey):
    with pytest.raises((ValueError, TypeError), match=r"init must be one of \['"):
        lrjax.LoRA(2, init="svd")
    model, key = Layers(getkey()), getkey()
    for name in ("pissa", "milora", "olora"):
        kind = lrjax.LoRA(6, init=name)
        with pytest.raises(ValueError, match=r"table \(5, 9\) has 5 of them"):
            lrjax.adapt(model, kind, where=["table"], key=key)
    table, inputs = gradients(key)["table"], statistics(rows_of(key))["table"]
    for name, rank, data, match in (
        ("lora_ga", 3, table, "6 singular vectors are asked of a matrix that has 5"),
        ("eva", 10, inputs, r"table \(5, 9\) hold 9 of them"),
        ("lora_one", 2, inputs, "starts from the gradient of table"),
        ("spectral", 2, table.T, "starts from the gradient of table"),
        ("corda", 2, table, "starts from the inputs of table"),
    ):
        kind = lrjax.LoRA(rank, init=name)
        with pytest.raises((ValueError, TypeError), match=match):
            lrjax.adapt(model, kind, where=["table"], key=key, data={"table": data})
