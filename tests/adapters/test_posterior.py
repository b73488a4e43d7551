"""A posterior of adapters: its noise, its mean, and the width that a search finds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import OneAndStack, moved
from tests.helpers import assert_close


MODEL = OneAndStack(jr.key(0), 3)
PATHS = ["one", "stack"]
KINDS = {
    "more columns than rows": lrjax.LoRA(9),
    "a pool": lrjax.VeRA(rank=3),
    "a frozen start, a bias beside": room.WithBias(lrjax.LoRA(2, 6.0, init="pissa")),
}


def trained(kind, key, model=MODEL, where=PATHS):
    adapters = lrjax.adapt(model, kind, where=where, key=key)
    params, frozen = lrjax.partition(adapters)
    return eqx.combine(moved(params, key), frozen)


def arrays(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_array))


@pytest.mark.slow_but("a frozen start, a bias beside")
@pytest.mark.parametrize("name", KINDS)
def test_its_mean_is_the_adapters_and_its_noise_lies_in_the_span_of_b(name, getkey):
    scale, count = 0.2, 400

    @jax.jit
    def drawn(key):
        adapters = trained(KINDS[name], key)
        posterior = room.isotropic_posterior(adapters, scale)
        merged = lambda own: arrays(lrjax.merge(MODEL, own))
        both = merged(adapters), merged(posterior.mean)
        weight = lambda key: lrjax.merge(MODEL, posterior.sample(key=key)).one.weight
        change = lrjax.merge(MODEL, adapters).one.weight - MODEL.one.weight
        mean = lrjax.merge(MODEL, adapters).one.weight
        return *both, jax.vmap(weight)(jr.split(key, count)) - mean[None], change

    want, mean, noise, change = drawn(getkey())
    assert_close(mean, want, condition=100)
    # σ in every direction of the span of B.
    left = np.linalg.svd(np.asarray(change, np.float64))[0]
    rank = np.linalg.matrix_rank(np.asarray(change, np.float64), tol=1e-5)
    coordinates = np.einsum("mk,smn->skn", left, noise)
    inside = coordinates[:, :rank]
    assert abs(inside.std() / scale - 1) < 6 / np.sqrt(2 * inside.size)
    assert abs(inside.mean()) < 6 * scale / np.sqrt(inside.size)


def test_the_noise_does_not_depend_on_how_the_product_is_cut(getkey):
    """Nor on its scale: its directions are those of the span of B, all alike."""
    layer = eqx.nn.Linear(5, 6, key=getkey())
    own = trained(lrjax.LoRA(2, 4.0), getkey(), layer, None)
    turn = jr.normal(getkey(), (2, 2)) + 2 * jnp.eye(2)
    pair, key = own[""].pair, getkey()

    def cut(left, right, scale):
        where = lambda a: (a.layers[""].pair, a.layers[""].scale)
        whole = lrjax.LowRank(pair.left @ left, pair.right @ right)
        return eqx.tree_at(where, own, (whole, own[""].scale / scale))

    @jax.jit
    def described(own):
        posterior = room.isotropic_posterior(own, 0.3)
        left = posterior.mean[""].pair.left * posterior.deviations[""][None]
        drawn = lrjax.merge(layer, posterior.sample(key=key)).weight
        return left @ left.T, drawn, posterior.deviations[""]

    span, drawn, deviations = described(own)
    values = np.linalg.svd(np.asarray(own[""].scale * pair.left, np.float64))[1]
    assert_close(deviations, jnp.asarray(1 / (values + 1e-6), jnp.float32), rtol=1e-4)
    turned = described(cut(turn, jnp.linalg.inv(turn).T, 1))
    assert_close(turned[0], span, rtol=1e-3)
    scaled = described(cut(8 * jnp.eye(2), jnp.eye(2), 8))
    assert_close(scaled[1], drawn, rtol=1e-4)


def test_where_nothing_was_learnt_there_is_no_noise(getkey):
    layer = eqx.nn.Linear(5, 6, key=getkey())
    posterior = room.isotropic_posterior(
        lrjax.adapt(layer, lrjax.LoRA(2), key=getkey()), 9.0
    )
    drawn = lrjax.merge(layer, posterior.sample(key=getkey()))
    assert_close(drawn, layer)


@pytest.mark.slow
def test_copies_stay_and_averages_are_the_loop(getkey):
    model = eqx.nn.MLP(4, 3, 8, 1, key=getkey())
    kind = lambda path, site: room.Full() if path == "layers.1" else lrjax.LoRA(2)
    own = trained(kind, getkey(), model, None)
    posterior = room.isotropic_posterior(own, 0.1)
    x, key = jr.normal(getkey(), (5, 4)), getkey()
    predict = lambda a: {"p": jax.nn.softmax(jax.vmap(lrjax.bind(model, a))(x))}
    average = jax.jit(lambda p: p.average(predict, key=key, samples=3))
    draws = [posterior.sample(key=k) for k in jr.split(key, 3)]
    for drawn in draws:
        assert eqx.tree_equal(drawn["layers.1"], own["layers.1"])
    each = [np.asarray(predict(a)["p"]) for a in draws]
    assert_close(average(posterior)["p"], jnp.asarray(np.mean(each, 0)), rtol=1e-5)


@pytest.mark.slow
def test_the_search_finds_the_largest_scale_that_holds(getkey):
    layer = eqx.nn.Linear(5, 6, key=getkey())
    posterior = room.isotropic_posterior(trained(lrjax.LoRA(2), getkey(), layer, None))
    mean, key = posterior.mean[""].pair.materialize(), getkey()

    def loss(best):
        """Least at some distance from the mean, as on examples set apart."""

        def of_each(own):
            away = jnp.linalg.norm(own[""].pair.materialize() - mean)
            return -1 - (away - best) ** 2 * jnp.ones(3)

        return of_each

    def found(best, bracket=(1e-4, 1.0)):
        return room.search_scale(
            loss(best), posterior, key=key, tolerance=0.01, bracket=bracket, samples=4
        )

    @jax.jit
    def searches(best):
        return found(best), found(best, (1e-6, 1e-5)), found(best, (10.0, 20.0))

    @jax.jit
    def nll(scale, best):  # by hand
        wide = eqx.tree_at(lambda p: p.scale, posterior, scale)
        draw = lambda key: jnp.exp(loss(best)(wide.sample(key=key)))
        return -jnp.mean(jnp.log(jnp.mean(jax.vmap(draw)(jr.split(key, 4)), axis=0)))

    for best in (0.0, 0.5):
        own, low, high = searches(best)
        assert bool(own.trusted)
        assert_close(own.nll_before, 1 + jnp.array(best) ** 2, rtol=1e-6)
        scales = jnp.geomspace(1e-4, 1, 300)
        curve = np.asarray(jax.vmap(nll, in_axes=(0, None))(scales, best))
        limit = 1.01 * float(own.nll_least)
        assert curve.min() - 1e-6 <= float(own.nll_least) < 1.1 * curve.min()
        assert float(own.nll_after) <= limit + 1e-6
        assert abs(float(nll(own.scale, best)) - float(own.nll_after)) < 1e-5
        # 1.02 is the resolution: no scale beyond it holds.
        assert curve[np.asarray(scales) > 1.05 * own.scale].min() > limit
        assert float(own.posterior.scale) == float(own.scale)
        # At either end of the bracket that is what is said.
        assert bool(low.at_upper)
        assert not bool(low.trusted)
        assert_close(low.scale, jnp.asarray(1e-5), rtol=1e-5)
        assert bool(high.at_lower)
        assert not bool(high.trusted)
        assert float(high.scale) == 0
        assert_close(high.nll_after, high.nll_before)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_never_holds(getkey):
    layer = eqx.nn.Linear(5, 6, key=getkey())
    posterior = room.isotropic_posterior(trained(lrjax.LoRA(2), getkey(), layer, None))
    mean = posterior.mean[""].pair.materialize()
    quiet = lambda own: jnp.all(jnp.abs(own[""].pair.materialize() - mean) < 0.05)
    loss = lambda own: jnp.where(quiet(own), -1.0, jnp.nan) * jnp.ones(3)
    found = room.search_scale(loss, posterior, key=getkey(), samples=2)
    assert 0.005 < float(found.scale) < 0.06
    assert np.isfinite(found.nll_after)
    broken = lambda own: jnp.full(3, jnp.nan) * own[""].scale
    assert not bool(
        room.search_scale(broken, posterior, key=getkey(), points=2, steps=1).trusted
    )


def test_refusals(getkey):
    layer = eqx.nn.Linear(4, 3, key=getkey())
    dora = lrjax.adapt(layer, lrjax.DoRA(2), key=getkey())
    with pytest.raises(ValueError, match=r"a Magnitude, whose change .*as_lora"):
        room.isotropic_posterior(dora)
    own = lrjax.adapt(layer, lrjax.LoRA(2), key=getkey())
    with pytest.raises(ValueError, match="only a part of one"):
        room.isotropic_posterior(lrjax.partition(own)[0])
    posterior = room.isotropic_posterior(own)
    for bracket, points in (((0.0, 1.0), 8), ((2.0, 1.0), 8), ((0.1, 1.0), 1)):
        with pytest.raises(ValueError, match="two positive scales, the smaller one first"):
            room.search_scale(
                lambda a: a[""].scale[None],
                posterior,
                key=getkey(),
                bracket=bracket,
                points=points,
            )
