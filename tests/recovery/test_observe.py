import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
import xarray

import lrjax
from lrjax import recovery

from ..helpers import assert_close, random_low_rank


@pytest.mark.slow
def test_distances_are_those_of_dense_matrices():
    truth = random_low_rank(jr.key(0), 9, 7, 3)
    x = random_low_rank(jr.key(1), 9, 7, 2)
    got = recovery.staircase(truth)(recovery.SolveState(0, x, 0.0)).distances
    for s in (1, 2, 3):
        best = lrjax.truncate(truth, s).materialize()
        want = jnp.linalg.norm(x.materialize() - best) / jnp.linalg.norm(best)
        assert_close(got[s - 1], want, condition=100)


@pytest.fixture(scope="module")
def climb():
    """Plain descent from a small start: ranks 1, 2, 3 one after the other."""
    keys = jr.split(jr.key(0), 2)
    left, right = (jnp.linalg.qr(jr.normal(k, (12, 3)))[0] for k in keys)
    truth = lrjax.LowRank(left * jnp.array([[4.0, 2.0, 1.0]]), right)
    problem = recovery.Problem(
        recovery.Identity((12, 12)), truth.materialize(), recovery.Squared(), truth
    )
    see = recovery.staircase(truth)

    @jax.jit
    @jax.vmap
    def run(alpha):
        start = lrjax.lowrank.small_init(problem.shape, 4, alpha, key=jr.key(2))
        observe = lambda state: (recovery.spectrum(state), see(state))
        return lrjax.solve(problem, optax.sgd(0.05), start, steps=600, observe=observe)

    return run(jnp.array([1e-1, 1e-3, 1e-5]))


@pytest.mark.slow
def test_small_starts_climb_the_ranks_one_by_one(climb):
    """A dip for every rank, in order, the deeper the smaller the start."""
    distances = np.asarray(climb.history.observed[1].distances)
    dips = distances.min(axis=1)
    assert np.all(dips[2] < 0.02)
    assert np.all(dips[2, :2] < 0.2 * dips[0, :2])
    order = distances[2].argmin(axis=0)
    assert np.all(np.diff(order) > 20)


@pytest.mark.slow
def test_singular_values_grow_one_by_one(climb):
    """Half of each value of the truth, and plateaus as long as log(1/α) over its size."""
    values = np.asarray(climb.history.observed[0].singular_values)
    arrival = np.stack(
        [(values[..., k] > s / 2).argmax(axis=1) for k, s in enumerate((4, 2, 1))], axis=-1
    )
    per_decade = (arrival[2] - arrival[1]) / 2
    assert np.allclose(
        per_decade, 2 * np.log(10) / (2 * 0.05 * np.array([4, 2, 1])), rtol=0.25
    )
    imbalance = np.asarray(climb.history.observed[0].imbalance)
    assert np.all(imbalance[:, -1] < 0.05)


def test_plots(climb):
    one = jax.tree.map(lambda a: a[2], climb)
    first = one.plot()
    panels = first.figure.axes
    assert len(panels) == 2
    assert len(panels[1].lines) == 4 + 1 + 3
    assert len(one.plot(ax=plt.figure().add_subplot()).figure.axes) == 1
    rates = recovery.success_rate(jnp.array([[[1e-5, jnp.nan]], [[1.0, 1e-9]]]))
    assert rates.tolist() == [[0.5, 0.5]]
    drawn = recovery.plot_success(jnp.eye(3), [1, 2, 3], [1, 2, 3])
    assert drawn.get_xlim() == (0.5, 3.5)
    with pytest.raises(ValueError, match="shape"):
        recovery.plot_success(rates, [1, 2, 3], [1])
    plt.close("all")


def test_success_of_a_sweep_is_drawn_by_its_names():
    sizes = {"key": 4, "rank": 2, "outliers": 3}
    errors = np.ones(tuple(sizes.values()))
    errors[:3, 0, 1] = 1e-6
    coords = {name: np.arange(n) + 10.0 for name, n in sizes.items()}
    runs = xarray.Dataset({"error": (tuple(sizes), errors)}, coords)
    rates = recovery.success_rate(runs, axis="key")
    assert rates["error"].sel(rank=10, outliers=11) == 0.75
    assert recovery.success_rate(runs["error"], axis=0).equals(rates["error"])
    drawn = recovery.plot_success(rates)
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("outliers", "rank")
    assert drawn.get_xlim() == (9.5, 12.5)
    turned = recovery.plot_success(rates["error"], x="rank")
    assert (turned.get_xlabel(), turned.get_xlim()) == ("rank", (9.5, 11.5))
    np.testing.assert_array_equal(
        turned.collections[0].get_array(), drawn.collections[0].get_array().T
    )
    plt.close("all")
    with pytest.raises(ValueError, match=r"draws two dimensions, got \('key', 'rank'"):
        recovery.plot_success(runs["error"])
    with pytest.raises(ValueError, match=r"one variable, got \['error', 'other'\]"):
        recovery.plot_success(runs.assign(other=runs["error"]))
    with pytest.raises(ValueError, match="unless rates are an xarray"):
        recovery.plot_success(np.ones((2, 2)))
