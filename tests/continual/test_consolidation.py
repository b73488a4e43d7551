"""Importances at plateaus, and Online-LoRA without what its published code gets wrong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.continual import Consolidation

from ..helpers import assert_close


def loss(w, x, y):
    return jnp.sum((w @ x - y) ** 2) / 2


def samples(key, count=6):
    a, b = jr.split(key)
    return jr.normal(a, (count, 4)), jr.normal(b, (count, 3))


def gradients(w, x, y):
    """Of each sample, by hand."""
    w, x, y = (np.asarray(a, np.float64) for a in (w, x, y))
    return (x @ w.T - y)[:, :, None] * x[:, None, :]


@pytest.fixture
def setting(getkey):
    w = jr.normal(getkey(), (3, 4))
    start = Consolidation.start(w, (jnp.zeros(4), jnp.zeros(3)), hardest=4, window=2)
    return w, start


@jax.jit
def seen(own, w, batch):
    losses = jax.vmap(loss, (None, 0, 0))(w, *batch)
    return own.watch(losses, batch)[0], losses


consolidate = jax.jit(lambda own, w, when: own.consolidate(loss, w, when=when))


@pytest.mark.slow
def test_all_hard_samples_count(setting, getkey):
    """The published code reads them from an iterator that the first one exhausts."""
    w, own = setting
    batch = samples(getkey())
    own, losses = seen(own, w, batch)
    hardest = np.argsort(-np.asarray(losses))[:4]
    squares = gradients(w, *(a[hardest] for a in batch)) ** 2
    got = consolidate(own, w, True)
    assert_close(got.importance, squares.mean(0), condition=100)
    assert np.linalg.norm(got.importance - squares[0]) > 1e-3
    assert got.plateaus == 1
    assert not np.any(np.isfinite(got.losses))


def test_importances_are_the_mean_over_plateaus(setting, getkey):
    w, own = setting
    want = []
    for k in range(3):
        batch = samples(getkey(), 4)
        own, _ = seen(own, w + k, batch)
        want.append((gradients(w + k, *batch) ** 2).mean(0))
        own = consolidate(own, w + k, True)
    assert_close(own.importance, np.mean(want, axis=0), condition=100)


def test_fewer_samples_than_there_is_room_for_are_a_mean_of_those(setting, getkey):
    w, own = setting
    batch = samples(getkey(), 2)
    own = consolidate(seen(own, w, batch)[0], w, True)
    assert_close(own.importance, (gradients(w, *batch) ** 2).mean(0), condition=100)
    none = consolidate(setting[1], w, True)
    np.testing.assert_array_equal(none.importance, np.zeros((3, 4)))


@pytest.mark.slow
def test_nothing_happens_where_it_is_not_due_and_members_are_on_their_own(setting, getkey):
    w, own = setting
    own, _ = seen(own, w, samples(getkey()))
    same = consolidate(own, w, False)
    assert eqx.tree_equal(same, own)
    both = jax.vmap(lambda when: consolidate(own, w, when))(jnp.array([True, False]))
    member = lambda i: jax.tree.map(lambda x: x[i], both)
    want = consolidate(own, w, True)
    assert_close(member(0).importance, want.importance, condition=100)
    assert member(0).plateaus == 1
    assert eqx.tree_equal(member(1), own)


def test_the_hardest_are_kept_by_the_losses_of_now(setting, getkey):
    w, own = setting
    first, second = samples(getkey(), 5), samples(getkey(), 5)
    own, _ = seen(own, w, first)
    again = jnp.array([0.0, 1e3, 0.0, 1e3])  # of two of the four it has become small
    kept = np.asarray(own.samples[0])[[1, 3]]
    own, _ = jax.jit(lambda own, b: own.watch(jnp.full(5, 1.0), b, again=again))(
        own, second
    )
    np.testing.assert_array_equal(np.asarray(own.samples[0])[:2], kept)
    assert all(x in np.asarray(second[0]) for x in np.asarray(own.samples[0])[2:])


def test_the_penalty_is_elastic_weight_consolidation(setting, getkey):
    w, own = setting
    own = consolidate(seen(own, w, samples(getkey()))[0], w, True)
    moved = w + jr.normal(getkey(), w.shape)
    pull = jax.jit(jax.grad(own.penalty))(moved, w)
    tx = lrjax.add_anchor(1.0, w, own.importance)
    want = tx.update(jnp.zeros_like(w), tx.init(w), moved)[0]
    assert_close(pull, want, condition=100)


KIND = lrjax.LoRA(rank=2)
factors_of = lambda adapters: (adapters[""].pair.left, adapters[""].pair.right)


@pytest.fixture
def adapted(getkey):
    model = eqx.nn.Linear(6, 5, use_bias=False, key=getkey())
    adapters = lrjax.adapt(model, KIND, key=getkey())
    # Trained a little, so that both factors are nonzero.
    moved = lambda x: x + 0.3 * jr.normal(getkey(), x.shape)
    return model, eqx.tree_at(factors_of, adapters, replace_fn=moved)


@pytest.mark.slow
def test_a_fold_adds_products_not_factors(adapted, getkey):
    """Adding A' to A and B' to B changes the function by the cross terms."""
    model, adapters = adapted
    pair, scale = adapters[""].pair, adapters[""].scale
    folds = jax.jit(lrjax.fold(1, lrjax.adapters.Restart(KIND), key=getkey()))
    want = np.asarray(model.weight + scale * pair.materialize(), np.float64)
    for step in (1, 2):
        model, adapters, _ = folds(step, model, adapters, ())
        whole = lrjax.merge(model, adapters).weight
        assert_close(whole, want, condition=100)
        moved = lambda x: x + 0.3
        adapters = eqx.tree_at(factors_of, adapters, replace_fn=moved)
        want = want + np.asarray(scale * adapters[""].pair.materialize(), np.float64)
    new = adapters[""].pair
    factors = scale * (pair.left + new.left) @ (pair.right + new.right).T
    products = scale * (pair.materialize() + new.materialize())
    assert np.linalg.norm(factors - products) > 0.1 * np.linalg.norm(products)


def test_what_begins_anew_can_be_trained(adapted, getkey):
    """With both factors at zero both gradients are zero, and nothing is ever learned."""
    model, adapters = adapted
    folds = lrjax.fold(1, lrjax.adapters.Restart(KIND), key=getkey())
    model, adapters, _ = jax.jit(folds)(1, model, adapters, ())
    pair = adapters[""].pair
    assert not np.any(pair.left)
    assert np.all(np.linalg.norm(pair.right, axis=0) > 0)
    x = jr.normal(getkey(), (6,))

    @jax.jit
    def gradient(adapters):
        return jax.grad(lambda a: jnp.sum(lrjax.bind(model, a)(x) ** 2))(adapters)

    assert np.linalg.norm(gradient(adapters)[""].pair.left) > 1e-3
    dead = jax.tree.map(jnp.zeros_like, adapters)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient(dead)[""].pair))


@pytest.mark.slow
def test_online_lora_finds_the_ends_of_tasks_and_forgets_less(x64, getkey):
    """Two linear tasks that differ in which inputs vary most, and no word of when."""
    model = eqx.nn.Linear(6, 5, use_bias=False, key=getkey(), dtype=jnp.float64)
    kind = lrjax.LoRA(rank=3)
    adapters = lrjax.adapt(model, kind, key=getkey())
    teachers = jr.normal(getkey(), (2, 5, 6))
    spread = jnp.array([[1.0, 1.0, 1.0, 0.1, 0.1, 0.1], [0.4, 0.4, 0.4, 1.0, 1.0, 1.0]])
    steps, tx = 120, optax.adam(0.05)
    folds = lrjax.fold(1, lrjax.adapters.Restart(kind), key=getkey())

    def point(weight, x, y):
        return jnp.sum((weight @ x - y) ** 2) / 2

    keys = jr.split(getkey(), 2 * steps)

    @jax.jit
    def train(strength):
        params, frozen = lrjax.partition(adapters)
        own = Consolidation.start(
            model.weight, (jnp.zeros(6), jnp.zeros(5)), hardest=16, level=0.4, spread=0.2
        )

        def body(carry, inputs):
            model, params, state, own = carry
            step, key = inputs
            task = (step > steps).astype(int)
            x = jr.normal(key, (16, 6)) * spread[task][None]
            # With noise, or there is no gradient left to tell what is important.
            y = x @ teachers[task].T + jr.normal(jr.fold_in(key, 1), (16, 5))

            def total(params):
                w = lrjax.merge(model, eqx.combine(params, frozen)).weight
                losses = jax.vmap(point, (None, 0, 0))(w, x, y)
                held = strength * own.penalty(w, model.weight)
                return jnp.mean(losses) + held, (losses, w)

            grads, (losses, w) = jax.grad(total, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            own, due = own.watch(losses, (x, y))
            own = own.consolidate(point, w, when=due)
            whole = eqx.combine(params, frozen)
            model, whole, state = folds(jnp.where(due, step, 0), model, whole, state)
            w = lrjax.merge(model, whole).weight
            old = jnp.sum(((w - teachers[0]) * spread[0][None]) ** 2)
            return (model, lrjax.partition(whole)[0], state, own), (due, old)

        inputs = jnp.arange(1, 2 * steps + 1), keys
        start = model, params, tx.init(params), own
        return jax.lax.scan(body, start, inputs)[1]

    due, old = train(jnp.array(1.0))
    assert np.any(due)
    _, plain = train(jnp.array(0.0))
    assert old[-1] < 0.5 * plain[-1]


@pytest.mark.usefixtures("shapes_unchecked")
def test_errors(setting):
    _, own = setting
    with pytest.raises(ValueError, match="hardest >= 1 samples to keep, got 0"):
        Consolidation.start(jnp.zeros(2), jnp.zeros(2), hardest=0)
    with pytest.raises(ValueError, match=r"3 losses with a batch .* got \[\(2, 4\)"):
        own.watch(jnp.zeros(3), (jnp.zeros((2, 4)), jnp.zeros((2, 3))))
