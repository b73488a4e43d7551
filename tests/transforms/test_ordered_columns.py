"""Columns that order themselves: prefixes, the hierarchical lasso and pruning."""

import collections

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import lowrank
from lrjax.transforms import sample_prefix
from tests.helpers import all_finite, assert_close, random_low_rank, with_spectrum
from tests.reference import spectra as reference


def test_every_layer_and_width_is_as_likely(getkey):
    """Eight pairs: widths 1 and 2 of one layer, 1 to 3 of each of two in a stack."""
    params = {
        "one": random_low_rank(getkey(), 4, 4, 2),
        "stack": random_low_rank(getkey(), 5, 4, 3, batch=(2,)),
        "bias": jnp.ones(3),
    }

    def widths(key):
        new = sample_prefix(params, key=key)
        counts = [lowrank.columns_in_use(new[name]) for name in ("one", "stack")]
        return jnp.concatenate([c.ravel() for c in counts])

    draws = 4000
    found = jax.jit(jax.vmap(widths))(jr.split(getkey(), draws))
    counted = collections.Counter(map(tuple, np.asarray(found).tolist()))
    pairs = {(1, 3, 3), (2, 1, 3), (2, 2, 3), (2, 3, 1), (2, 3, 2), (2, 3, 3)}
    assert set(counted) == pairs
    # Whole are the three pairs that cut nothing.
    want = {pair: draws / 8 for pair in pairs} | {(2, 3, 3): 3 * draws / 8}
    spread = (draws * 3 / 8 * 5 / 8) ** 0.5
    assert all(abs(counted[pair] - want[pair]) < 5 * spread for pair in pairs)


@pytest.mark.slow
def test_columns_that_are_gone_are_not_drawn(getkey):
    x = lowrank.first_columns(random_low_rank(getkey(), 6, 5, 4), 2)
    draw = lambda key: lowrank.columns_in_use(sample_prefix(x, key=key))
    found = jax.jit(jax.vmap(draw))(jr.split(getkey(), 50))
    assert set(found.tolist()) == {1, 2}
    nothing = jax.tree.map(jnp.zeros_like, x)
    assert_close(sample_prefix(nothing, key=getkey()), nothing)


def test_a_prefix_is_a_cut_and_cut_columns_have_no_gradient(getkey):
    x = random_low_rank(getkey(), 6, 5, 4, batch=(2,))
    ranks = jnp.array([1, 3])
    got, back = jax.vjp(lambda x: lowrank.first_columns(x, ranks).materialize(), x)
    for i, r in enumerate((1, 3)):
        assert_close(got[i], x.left[i, :, :r] @ x.right[i, :, :r].T, condition=10)
    slope = back(jnp.ones_like(got))[0]
    assert not slope.left[0, :, 1:].any()
    assert not slope.right[1, :, 3:].any()


@jax.jit
def lasso(x):
    zero = jax.tree.map(jnp.zeros_like, x)
    tx = lrjax.add_hierarchical_lasso(0.3, eps=1e-12)
    return tx.update(zero, tx.init(x), x)[0]


def test_the_lasso_is_the_gradient_of_its_norms(getkey, x64):
    x = random_low_rank(getkey(), 6, 5, 4, dtype=jnp.float64)
    got = lasso(x)
    assert_close(got.left, reference.lasso_slope(np.asarray(x.left), 0.3), condition=10)
    # Columns of zeros, where norms have no gradient, get none.
    cut = lowrank.first_columns(x, 2)
    got = lasso(cut)
    assert_close(got.right, reference.lasso_slope(np.asarray(cut.right), 0.3), condition=10)
    assert not got.right[:, 2:].any()
    assert all_finite(lasso(jax.tree.map(jnp.zeros_like, x)))


SETTINGS = {"strength": 0.5, "threshold": 0.3, "period": 4}


@pytest.mark.slow
def test_maestro_is_that_of_its_reference_with_arrays_that_shrink(getkey, x64):
    """The same steps, whatever rank is left, in one program."""
    target = with_spectrum(getkey(), 6, 5, [3.0, 1.0, 0.1], jnp.float64)
    x = random_low_rank(getkey(), 6, 5, 5, dtype=jnp.float64)
    x = jax.tree.map(lambda f: 0.5 * f, x)
    tx = lrjax.maestro(0.01, **SETTINGS)

    def step(carry, key):
        x, state = carry

        def loss(x):
            part = sample_prefix(x, key=key)
            return jnp.sum((part.materialize() - target) ** 2), part

        slope, part = jax.grad(loss, has_aux=True)(x)
        updates, state = tx.update(slope, state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), (x, lowrank.columns_in_use(part))

    keys = jr.split(getkey(), 60)
    start = (x, tx.init(x))
    path, widths = jax.jit(lambda s: jax.lax.scan(step, s, keys)[1])(start)
    left, right = np.asarray(x.left), np.asarray(x.right)
    want = reference.maestro(
        left, right, np.asarray(target), widths.tolist(), rate=0.01, **SETTINGS
    )
    ranks = []
    for got, (u, v) in zip(zip(path.left, path.right, strict=True), want, strict=True):
        rank = u.shape[1]
        for factor, theirs in zip(got, (u, v), strict=True):
            assert_close(factor[:, :rank], theirs, rtol=1e-9)
            assert not factor[:, rank:].any()
        ranks.append(rank)
    assert ranks[-1] < 5, "nothing was pruned"


@pytest.mark.slow
def test_trained_prefixes_are_the_singular_directions(getkey, x64):
    """The mean over all prefixes is least where each is the best of its rank."""
    values = [3.0, 2.0, 1.0]
    target = with_spectrum(getkey(), 5, 4, values, jnp.float64)
    x = lrjax.truncate(jr.normal(getkey(), (5, 4), jnp.float64), 3)

    def loss(x):
        at = lambda r: jnp.sum((lowrank.first_columns(x, r).materialize() - target) ** 2)
        return jnp.mean(jax.vmap(at)(jnp.arange(1, 4)))

    tx = optax.adam(optax.cosine_decay_schedule(0.05, 2000))

    @jax.jit
    def trained(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=2000)[0][0]

    x = trained(x)
    for rank in (1, 2, 3):
        best = lrjax.truncate(target, rank).materialize()
        got = lowrank.first_columns(x, rank).materialize()
        assert jnp.linalg.norm(got - best) < 1e-3


@pytest.mark.slow
def test_pruned_columns_stay_zero_whatever_the_step(getkey):
    x = lowrank.first_columns(
        random_low_rank(getkey(), 6, 5, 4, batch=(2,)), jnp.array([3, 1])
    )
    tx = lrjax.prune_columns(1e-3, period=2)
    noise = random_low_rank(getkey(), 6, 5, 4, batch=(2,))
    state = tx.init(x)
    still = jax.tree.map(jnp.zeros_like, x)
    ranks = []
    for update in (still, still, noise, noise):
        updates, state = tx.update(update, state, x)
        x = optax.apply_updates(x, updates)
        ranks.append(state.rank.tolist())
    assert ranks == [[4, 4], [3, 1], [3, 1], [3, 1]]
    assert lowrank.columns_in_use(x).tolist() == [3, 1]


def test_refusals(getkey):
    with pytest.raises(ValueError, match="at least one step, got 0"):
        lrjax.prune_columns(0.1, period=0)
    with pytest.raises(ValueError, match=r"no lrjax.LowRank node"):
        sample_prefix({"w": jnp.ones((3, 3))}, key=getkey())
