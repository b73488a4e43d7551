import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.adapters.models import everything, randomized
from tests.helpers import assert_close


def linear(getkey, n=64, m=48):
    return eqx.nn.Linear(n, m, key=getkey())


def test_start_is_kaiming_uniform_and_zero(getkey):
    adapter = lrjax.adapt(linear(getkey, 1024), lrjax.LoRA(64), key=getkey()).layers[""]
    bound = 1 / np.sqrt(1024)
    right = np.asarray(adapter.pair.right)
    assert not np.any(adapter.pair.left)
    assert np.abs(right).max() <= bound
    # 65,536 uniform numbers: the standard error of their deviation is 0.2 percent.
    np.testing.assert_allclose(right.std(), bound / np.sqrt(3), rtol=0.02)


def test_embedding_starts_with_a_zero_right_factor(getkey):
    table = eqx.nn.Embedding(500, 32, key=getkey())
    adapter = lrjax.adapt(table, lrjax.LoRA(16), where=everything, key=getkey()).layers[""]
    assert adapter.pair.left.shape == (32, 16)
    assert adapter.pair.right.shape == (500, 16)
    assert not np.any(adapter.pair.right)
    np.testing.assert_allclose(np.std(adapter.pair.left), 1, rtol=0.2)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        (lrjax.LoRA(4), 1.0),
        (lrjax.LoRA(4, alpha=8), 2.0),
        (lrjax.LoRA(4, alpha=8, rank_stabilized=True), 4.0),
        (lrjax.LoRA(9, rank_stabilized=True), 3.0),
    ],
)
def test_scale(kind, scale, getkey):
    adapter = lrjax.adapt(linear(getkey), kind, key=getkey()).layers[""]
    assert_close(adapter.scale, jnp.asarray(scale))


@pytest.mark.slow
def test_rank_stabilized_change_does_not_shrink_with_the_rank(getkey):
    """With factors of fixed variance ‖ΔW‖ is level in the rank with 1/√r only."""
    layer = linear(getkey)

    def size(rank, stabilized):
        kind = lrjax.LoRA(rank, alpha=1.0, rank_stabilized=stabilized)
        adapters = lrjax.adapt(layer, kind, key=getkey())
        sizes = []
        for _ in range(5):
            pair, scale = randomized(adapters, getkey()).layers[""].factors()
            sizes.append(scale * lrjax.norm(pair))
        return np.mean(sizes)

    np.testing.assert_allclose(size(4, True) / size(36, True), 1, rtol=0.2)
    np.testing.assert_allclose(size(4, False) / size(36, False), 3, rtol=0.2)


@pytest.mark.slow
def test_at_the_start_only_the_left_factor_has_a_gradient(getkey):
    layer = linear(getkey)
    params, frozen = lrjax.partition(lrjax.adapt(layer, lrjax.LoRA(4), key=getkey()))
    x = jr.normal(getkey(), (64,))

    def loss(params):
        return jnp.sum(lrjax.bind(layer, eqx.combine(params, frozen))(x) ** 2)

    gradient = jax.grad(loss)(params).layers[""].pair
    assert not np.any(gradient.right)
    assert np.any(gradient.left)


def test_alpha_sweep_is_one_program(getkey):
    layer, x, start = linear(getkey), jr.normal(getkey(), (64,)), getkey()
    alphas = jnp.array([0.0, 1.0, 5.0])
    traces = []

    @jax.jit
    def run(alphas):
        traces.append(1)

        def member(alpha):
            adapters = lrjax.adapt(layer, lrjax.LoRA(4, alpha=alpha), key=start)
            return lrjax.bind(layer, randomized(adapters, start))(x)

        return jax.vmap(member)(alphas)

    got = run(alphas)
    run(alphas + 1)
    assert len(traces) == 1
    for alpha, y in zip(alphas, got, strict=True):
        kind = lrjax.LoRA(4, alpha=float(alpha))
        adapters = randomized(lrjax.adapt(layer, kind, key=start), start)
        assert_close(y, lrjax.merge(layer, adapters)(x), condition=10)
    assert_close(got[0], layer(x))


def test_swapping_the_gauge_leaves_the_model_as_it_is(getkey):
    layer, x = linear(getkey), jr.normal(getkey(), (64,))
    adapters = randomized(lrjax.adapt(layer, lrjax.LoRA(4), key=getkey()), getkey())
    gauge = jr.normal(getkey(), (4, 4)) + 3 * jnp.eye(4)
    pair = adapters.layers[""].pair
    turned = lrjax.LowRank(pair.left @ jnp.linalg.inv(gauge), pair.right @ gauge.T)
    other = eqx.tree_at(lambda a: a.layers[""].pair, adapters, turned)
    condition = 10 * float(jnp.linalg.cond(gauge))
    want = lrjax.bind(layer, adapters)(x)
    assert_close(lrjax.bind(layer, other)(x), want, condition=condition)


@pytest.mark.parametrize("rank", [0, -1, True])
def test_bad_rank_is_refused(rank):
    with pytest.raises(ValueError, match="rank of at least 1"):
        lrjax.LoRA(rank=rank)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_bad_dropout_is_refused(rate):
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        lrjax.LoRA(dropout=rate)


def dropped(getkey, rate=0.5):
    layer = eqx.nn.Linear(64, 64, key=getkey())
    adapters = lrjax.adapt(layer, lrjax.LoRA(64, dropout=rate), key=getkey())
    # An adapter that copies its input shows the mask.
    pair = lrjax.LowRank(jnp.eye(64), jnp.eye(64))
    return layer, eqx.tree_at(lambda a: a.layers[""].pair, adapters, pair)


def test_dropout_needs_a_key_and_drops_the_input_of_the_adapter_alone(getkey):
    layer, adapters = dropped(getkey)
    x, key = jr.normal(getkey(), (64,)) + 5, getkey()
    assert_close(lrjax.bind(layer, adapters)(x), layer(x) + x, condition=10)
    change = lrjax.bind(layer, adapters, key=key)(x) - layer(x)
    kept = np.asarray(jnp.abs(change) > 1)
    assert 10 < kept.sum() < 54
    assert_close(change, jnp.where(kept, 2 * x, 0), condition=100)
    again = lrjax.bind(layer, adapters, key=key)(x) - layer(x)
    np.testing.assert_array_equal(again, change)
    other = lrjax.bind(layer, adapters, key=key)(x, key=getkey()) - layer(x)
    assert np.any(np.asarray(jnp.abs(other) > 1) != kept)


def test_every_vector_of_a_batch_has_its_own_dropout(getkey):
    layer, adapters = dropped(getkey)
    x, key = jnp.ones((3, 4, 64)), getkey()

    @jax.jit
    def masks(x, key):
        bound = lrjax.bind(layer, adapters, key=key)
        return jnp.abs(jax.vmap(jax.vmap(bound))(x) - jax.vmap(jax.vmap(layer))(x)) > 1

    got = np.asarray(masks(x, key)).reshape(12, 64)
    assert len(np.unique(got, axis=0)) == 12
    assert 0.35 < got.mean() < 0.65

    @jax.jit
    def with_key_for_each(x, keys):
        one = lambda x, key: jax.vmap(lrjax.bind(layer, adapters, key=key))(x)
        return jnp.abs(jax.vmap(one)(x, keys) - jax.vmap(jax.vmap(layer))(x)) > 1

    got = np.asarray(with_key_for_each(x, jr.split(key, 3))).reshape(12, 64)
    assert len(np.unique(got, axis=0)) == 12


@pytest.mark.slow
def test_dropout_keeps_the_mean_and_has_a_gradient(getkey):
    layer, adapters = dropped(getkey, rate=0.25)
    params, frozen = lrjax.partition(adapters)
    x = jnp.ones((2000, 64))

    @jax.jit
    def loss(params, key):
        bound = lrjax.bind(layer, eqx.combine(params, frozen), key=key)
        return jnp.mean(jax.vmap(bound)(x) - jax.vmap(layer)(x))

    value, gradient = jax.value_and_grad(loss)(params, getkey())
    # 128,000 draws of mean 1 and variance 1/3: five standard errors.
    assert abs(value - 1) < 5 * np.sqrt(1 / 3 / 128_000)
    assert np.all(np.diag(gradient.layers[""].pair.left) > 0)


def test_dropout_rates_sweep_under_vmap(getkey):
    layer, x, key = linear(getkey), jnp.ones(64), getkey()

    def member(rate):
        adapters = lrjax.adapt(layer, lrjax.LoRA(4, dropout=rate), key=key)
        return lrjax.bind(layer, randomized(adapters, key), key=key)(x)

    got = jax.vmap(member)(jnp.array([0.0, 0.9]))
    adapters = randomized(lrjax.adapt(layer, lrjax.LoRA(4), key=key), key)
    assert_close(got[0], lrjax.bind(layer, adapters)(x))
    assert np.any(got[0] != got[1])
