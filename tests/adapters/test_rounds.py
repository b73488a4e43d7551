"""Federated rounds: the loop, over devices, what each rule makes of clients; privacy."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import adapters as room
from lrjax.merging import geometric_median
from tests.adapters.models import merge, normal_like
from tests.helpers import assert_close, relative_error


OUT, IN, R, CLIENTS = 80, 96, 4, 8
RANKS = jnp.array([4, 4, 2, 2, 2, 1, 1, 1])
COUNTS = jnp.array([3.0, 1.0, 2.0, 5.0, 0.0, 1.0, 1.0, 1.0])
LAYER = eqx.nn.Linear(IN, OUT, key=jr.key(0))
KIND = lrjax.LoRA(R, 2.0 * R, init="small")
MESH = jax.make_mesh((8,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))


def train(model, adapters, data, key, tx=None):
    """Two steps of Adam on noisy inputs."""
    x, y = data
    x = x + 0.1 * jr.normal(key, x.shape)
    params, frozen = lrjax.partition(adapters)
    tx = optax.adam(1e-2) if tx is None else tx

    def loss(params):
        bound = lrjax.bind(model, eqx.combine(params, frozen))
        return jnp.mean((jax.vmap(bound)(x) - y) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, tx.init(params)), length=2)
    return eqx.combine(params, frozen), values


@jax.jit
def clients_of(key, ranks):
    adapt = lambda key: lrjax.adapt(LAYER, KIND, key=key)
    one = lambda key, rank: room.with_ranks(adapt(key), rank)
    return jax.vmap(one)(jr.split(key, CLIENTS), ranks)


@jax.jit
def even_clients(key):
    return jax.vmap(lambda key: lrjax.adapt(LAYER, KIND, key=key))(jr.split(key, CLIENTS))


merge_heads = eqx.filter_jit(room.merge_heads)


@eqx.filter_jit
def fold(rule, *args, **settings):
    return rule(*args, **settings)


def data_of(key):
    shapes = ((CLIENTS, 6, n) for n in (IN, OUT))
    structs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return normal_like(structs, key, 1.0)


def at(tree, index):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[index]), tree)


def factors(own):
    """``B`` and ``A`` of one client in float64, without what is masked, and its scale."""
    adapter = own[""]
    pair, scale = adapter.factors()
    return *(np.asarray(x, np.float64) for x in (pair.left, pair.right)), float(scale)


def mean_product(trained, shares):
    each = (factors(at(trained, h)) for h in range(CLIENTS))
    return sum(p * s * b @ a.T for p, (b, a, s) in zip(shares, each, strict=True))


def rules(axis_name=None):
    own = {"axis_name": axis_name}
    return {
        "stacked": room.Restart(KIND, heads=True, **own),
        "averaged": room.Average(exact=False, **own),
        "median": room.Restart(KIND, heads=True, mean=geometric_median, **own),
        "continued": room.Continue(heads=True, **own),
    }


def sends(compiled):
    """The shapes that devices send to each other."""
    pattern = r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute)\("
    found = re.findall(pattern, compiled.as_text())
    return [
        tuple(map(int, s.split(","))) for x in found for s in re.findall(r"\[([\d,]+)\]", x)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stacked", "averaged", "median", "continued"])
def test_a_round_over_devices_is_the_round(name, getkey):
    clients, data, key = clients_of(getkey(), RANKS), data_of(getkey()), getkey()
    clients = jax.jit(room.start_here)(clients) if name == "continued" else clients
    whole = jax.jit(room.federated_round(train, rules()[name]))
    want = whole(LAYER, clients, data, key=key, weights=COUNTS)
    spread = room.federated_round(train, rules("clients")[name], mesh=MESH)
    lowered = jax.jit(spread).lower(LAYER, clients, data, key=key, weights=COUNTS)
    compiled = lowered.compile()
    got = compiled(LAYER, clients, data, key=key, weights=COUNTS)
    assert_close(got[1:], want[1:], condition=10)
    change = lambda of: np.asarray(of[0].weight) - np.asarray(LAYER.weight)
    assert_close(change(got) + 1, change(want) + 1, condition=10)
    # No dense change is sent: of H r (m + n) numbers there are fewer than m n. With what
    # continued factors count from there are twice as many, and the sums are sent instead.
    dense = [shape for shape in sends(compiled) if {OUT, IN} <= {*shape}]
    assert sends(compiled)
    assert bool(dense) == (name == "continued")


@pytest.mark.slow
def test_stacking_is_the_loop_and_exact_for_any_ranks(getkey):
    clients, data, key = clients_of(getkey(), RANKS), data_of(getkey()), getkey()
    play = jax.jit(room.federated_round(train, rules()["stacked"]))
    model, after, reports = play(LAYER, clients, data, key=key, weights=COUNTS)
    one = jax.jit(lambda own, data, key: train(LAYER, own, data, key))
    keys = jr.split(jr.split(key)[0], CLIENTS)
    owns = [one(at(clients, h), at(data, h), keys[h]) for h in range(CLIENTS)]
    trained = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *[own for own, _ in owns])
    assert_close(reports, np.stack([values for _, values in owns]), condition=10)
    shares = np.asarray(COUNTS, np.float64) / np.sum(COUNTS)
    # New small factors are taken off the weights, so that the model is what it was.
    got = np.asarray(model.weight) - np.asarray(LAYER.weight)
    got += np.mean(
        [s * b @ a.T for b, a, s in (factors(at(after, h)) for h in range(8))], 0
    )
    size = np.linalg.norm(LAYER.weight)
    want = mean_product(trained, shares)
    assert np.linalg.norm(got - want) < 1e-6 * size
    assert room.active_ranks(after)[""].tolist() == RANKS.tolist()
    assert_close(after[""].scale, clients[""].scale)
    # A server that keeps all factors side by side has the same.
    kept = room.combine([own for own, _ in owns], shares.astype(np.float32), LAYER)
    assert kept[""].pair.rank == CLIENTS * R
    merged = merge_heads(LAYER, trained, weights=COUNTS)
    assert_close(merge(LAYER, kept).weight, merged.weight, condition=10)


@eqx.filter_jit
def fresh_clients(key, kind):
    return jax.vmap(lambda key: lrjax.adapt(LAYER, kind, key=key))(jr.split(key, CLIENTS))


def random_clients(key, kind=KIND, shared=False):
    """Clients with random factors, of which one may be the same for all."""
    clients = fresh_clients(key, kind)
    if shared:
        clients = at(clients, np.zeros(CLIENTS, int))
    params, frozen = lrjax.partition(clients)
    add = lambda x, off: jnp.asarray(np.asarray(x) + np.asarray(off))
    return eqx.combine(jax.tree.map(add, params, normal_like(params, key, 1.0)), frozen)


def error_after(rule, clients):
    """Of the first client's model after a fold, relative to the mean change."""
    want = mean_product(clients, np.full(CLIENTS, 1 / CLIENTS))

    @jax.jit
    def first(clients):
        model, after, _ = rule(LAYER, clients, (), key=jr.key(1))
        return lrjax.merge(model, jax.tree.map(lambda x: x[0], after)).weight

    return relative_error(np.asarray(first(clients)) - np.asarray(LAYER.weight), want)


@pytest.mark.slow
def test_averages_of_factors_miss_and_the_weights_take_it(getkey):
    clients = random_clients(getkey())
    assert error_after(room.Average(exact=False), clients) > 0.5
    assert error_after(room.Average(), clients) < 1e-5
    assert error_after(room.Restart(lrjax.LoRA(R), heads=True), clients) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_one_factor_frozen_and_shared_the_average_is_exact(side, getkey):
    kind = lrjax.LoRA(R, train=side)
    assert (
        error_after(room.Average(exact=False), random_clients(getkey(), kind, True)) < 1e-5
    )
    if side == "left":
        apart = random_clients(getkey(), kind)
        assert error_after(room.Average(exact=False), apart) > 0.5


def test_clients_that_are_all_the_same_stay_as_they_are(getkey):
    clients = at(random_clients(getkey()), np.zeros(CLIENTS, int))
    rest = (LAYER, clients, ())
    model, after, _ = fold(room.Average(), *rest, key=getkey(), weights=COUNTS)
    assert_close(model.weight, LAYER.weight, condition=10)
    assert_close(after, clients, condition=10)


@pytest.mark.slow
def test_absent_clients_may_hold_anything(getkey):
    clients = random_clients(getkey())
    here = np.arange(CLIENTS) != 4
    spoil = lambda x: np.where(here.reshape(-1, *(1,) * (x.ndim - 1)), x, np.nan)
    broken = jax.tree.map(lambda x: jnp.asarray(spoil(np.asarray(x)), x.dtype), clients)
    for mean in (None, geometric_median):
        got = merge_heads(LAYER, broken, weights=COUNTS, mean=mean)
        few = at(COUNTS, here)
        want = merge_heads(LAYER, at(clients, here), weights=few, mean=mean)
        assert_close(got, want, condition=1e3)
    nobody = merge_heads(LAYER, broken, weights=jnp.zeros(CLIENTS), mean=None)
    assert_close(nobody, LAYER)


@pytest.mark.slow
def test_less_than_half_cannot_move_a_median(getkey):
    clients = at(random_clients(getkey()), np.zeros(CLIENTS, int))
    change = lambda model: np.asarray(model.weight) - np.asarray(LAYER.weight)
    honest = change(merge(LAYER, at(clients, 0)))
    bad = np.arange(CLIENTS) < 3
    wild = lambda x: np.where(bad.reshape(-1, *(1,) * (x.ndim - 1)), -30 * x, x)
    clients = jax.tree.map(lambda x: jnp.asarray(wild(np.asarray(x))), clients)
    error = lambda model: relative_error(change(model), honest)
    median = room.Restart(KIND, heads=True, mean=geometric_median)
    assert error(merge_heads(LAYER, clients, mean=median.mean)) < 0.05
    assert error(merge_heads(LAYER, clients, mean=None)) > 1
    # A weight is as many clients as it says.
    x = list(normal_like(jax.ShapeDtypeStruct((5, 3), jnp.float32), getkey(), 1.0))
    median = jax.jit(geometric_median)
    twice = median([x[0], *x])
    assert_close(median(x, [2.0, 1.0, 1.0, 1.0, 1.0]), twice, rtol=1e-2)
    assert relative_error(median(x), twice) > 0.02


def private_update(params, frozen, x, y, clip, noise, key):
    """One step of plain descent with the gradients of single examples."""
    aggregate = optax.contrib.differentially_private_aggregate(clip, noise, key)
    tx = optax.chain(aggregate, optax.scale(-1.0))

    def loss(params, x, y):
        return jnp.sum((lrjax.bind(LAYER, eqx.combine(params, frozen))(x) - y) ** 2)

    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, y)
    return tx.update(grads, tx.init(params))[0], grads


def test_private_gradients_of_adapters(getkey):
    own = at(random_clients(getkey()), 0)
    params, frozen = lrjax.partition(own)
    x, y = at(data_of(getkey()), 0)
    step = jax.jit(lambda x, y, *rest: private_update(params, frozen, x, y, *rest))
    key = getkey()
    plain, grads = step(x, y, 1e9, 0.0, key)
    assert_close(plain, jax.tree.map(lambda g: -np.mean(g, 0), grads), condition=10)
    # What one example can change is bounded, whatever it is; the noise is that of the key.
    clip = 0.3
    first, _ = step(x, y, clip, 0.7, key)
    spoilt = np.array(x)
    spoilt[0] = 1e3
    other, _ = step(spoilt, y, clip, 0.7, key)
    flat = lambda tree: np.concatenate([np.ravel(n) for n in jax.tree.leaves(tree)])
    moved = np.linalg.norm(flat(first) - flat(other))
    assert 1e-4 < moved <= 2 * clip / len(x) * (1 + 1e-4)
    clean, _ = step(x, y, clip, 0.0, key)
    noise = flat(first) - flat(clean)
    deviation = 0.7 * clip / len(x)
    # Of N numbers the root mean square is off by 1/√(2N): five of these.
    assert abs(noise.std() / deviation - 1) < 5 / np.sqrt(2 * noise.size)


@pytest.mark.slow
def test_clients_and_rounds_have_noise_of_their_own(getkey):
    """With a clip of zero nothing but noise: no two of it are the same."""

    def train(model, adapters, data, key):
        del model
        params, frozen = lrjax.partition(adapters)
        update, _ = private_update(params, frozen, *data, 1e-3, 1e6, key)
        return eqx.combine(optax.apply_updates(params, update), frozen), update[
            ""
        ].pair.left

    play = jax.jit(room.federated_round(train, rules()["stacked"]))
    clients, data = even_clients(getkey()), data_of(getkey())
    drawn = [play(LAYER, clients, data, key=k)[2] for k in jr.split(getkey())]
    noise = np.concatenate([np.asarray(x).reshape(CLIENTS, -1) for x in drawn])
    correlations = np.corrcoef(noise) - np.eye(2 * CLIENTS)
    assert np.abs(correlations).max() < 6 / np.sqrt(noise.shape[1])


@pytest.mark.slow
def test_refusals(getkey):
    clients = clients_of(getkey(), RANKS)
    data, key = data_of(getkey()), getkey()
    with pytest.raises(ValueError, match="say heads=True"):
        room.federated_round(train, room.Restart(KIND))
    with pytest.raises(ValueError, match="axis_name=None, and the mesh"):
        room.federated_round(train, rules()["stacked"], mesh=MESH)
    with pytest.raises(ValueError, match="mean of heads: say heads=True"):
        room.Restart(KIND, mean=geometric_median)
    with pytest.raises(ValueError, match="masks, of ranks that may differ"):
        room.Average()(LAYER, clients, (), key=key)
    spread = room.federated_round(train, rules("clients")["stacked"], mesh=MESH)
    with pytest.raises(ValueError, match="6 clients for the 8 devices"):
        spread(LAYER, at(clients, slice(6)), at(data, slice(6)), key=key)
    with pytest.raises(ValueError, match=r"8 heads, and weights of shape \(2,\)"):
        room.merge_heads(LAYER, clients, weights=COUNTS[:2])
    with pytest.raises(ValueError, match="not negative"):
        room.merge_heads(LAYER, clients, weights=-COUNTS)
    with pytest.raises(ValueError, match="those of heads, and has none"):
        room.Restart(KIND)(LAYER, at(clients, 0), (), key=key, weights=COUNTS)
    shapes = lambda rule, own: eqx.filter_eval_shape(rule, LAYER, own, (), key=key)
    adapt = lambda kind: eqx.filter_eval_shape(fresh_clients, key, kind)
    with pytest.raises(ValueError, match="Magnitude, whose change is no product"):
        shapes(room.Average(), adapt(lrjax.DoRA(2)))
    with pytest.raises(ValueError, match="copies or biases"):
        shapes(rules()["median"], adapt(room.WithBias(KIND)))
    thinner = lambda model, own, data, key: (jax.tree.map(lambda x: x[None], own), ())
    with pytest.raises(ValueError, match="came back as"):
        room.federated_round(thinner, rules()["stacked"])(LAYER, clients, data, key=key)
