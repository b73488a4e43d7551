"""When stable ranks have settled: the rule of Cuttlefish, and the ranks that it names."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.metrics import SettledRanks, latent_volume


def of_stable_rank(rank, n=16):
    """A diagonal matrix whose stable rank is a given number from 1 to n."""
    return np.diag(np.r_[1.0, np.full(n - 1, np.sqrt((rank - 1) / (n - 1)))])


def follow(series, **settings):
    """The watch after each observation of layers whose stable ranks are given."""
    tree = lambda t: {k: jnp.asarray(of_stable_rank(v[t])) for k, v in series.items()}
    steps = len(next(iter(series.values())))
    watch = SettledRanks.of(tree(0), **settings)
    for t in range(1, steps):
        watch = watch.observe(tree(t))
        yield watch


def slope(values, window):
    """The mean size of the last eleven slopes of the smoothed series."""
    level, smooth = values[0], []
    for value in values:
        level = level * (1 - 2 / (window + 1)) + value * 2 / (window + 1)
        smooth.append(level)
    slopes = [smooth[1] - smooth[0]]
    slopes += [(b - a) / 2 for a, b in zip(smooth, smooth[2:], strict=False)]
    slopes.append(smooth[-1] - smooth[-2])
    return np.mean(np.abs(slopes[-11:]))


def test_layers_settle_by_the_rule_and_the_last_ones_sooner():
    t = np.arange(60)
    series = {
        "fast": 4 + 8 * np.exp(-t / 3),
        "mid": 3 + 9 * np.exp(-t / 9),
        "slow": 2 + 10 * np.exp(-t / 20),
    }
    settled = set()
    for step, watch in enumerate(follow(series, window=5, tol=0.1, first=8), start=1):
        waiting = [k for k in series if k not in settled]
        tol = 0.1 * {1: 5.0, 2: 2.5}.get(len(waiting), 1.0)
        if step >= 8:
            settled |= {k for k in waiting if slope(series[k][: step + 1], 5) <= tol}
        assert watch.settled == settled, step
        if watch.all_settled:
            break
    assert 11 < step < 59
    # Full rank is to the stable rank of the start as the rank is to that of the end.
    want = {k: int(np.ceil(16 * v[step] / v[0] - 1e-3)) for k, v in series.items()}
    assert watch.ranks == want


def test_nothing_settles_while_it_moves_or_before_its_time():
    t = np.arange(20)
    moving = follow({"w": 15 - 0.6 * t}, window=3, tol=0.05, first=2)
    assert not any(watch.settled for watch in moving)
    still = [w.all_settled for w in follow({"w": 5 + 0 * t}, first=12)]
    assert still == [False] * 11 + [True] * 8


@pytest.mark.slow
def test_the_ranks_are_those_that_factorize_takes(getkey):
    model = eqx.nn.MLP(16, 12, 24, 2, key=getkey())
    watch = SettledRanks.of(model, where=lambda path, shape: len(shape) == 2)
    is_matrix = lambda w: eqx.is_array(w) and w.ndim == 2
    cut = lambda w: lrjax.truncate(w, 3).materialize() if is_matrix(w) else w
    watch = watch.observe(jax.tree.map(cut, model))
    assert set(watch.ranks) == {"layers.0", "layers.1", "layers.2"}
    assert all(r < watch.full[f"{k}.weight"] for k, r in watch.ranks.items())
    small, _ = lrjax.nn.factorize(model, rank=watch.ranks)
    assert small.layers[1].weight.rank == watch.ranks["layers.1"]


def test_a_stack_counts_by_its_largest_and_refusals():
    stack = jnp.stack([jnp.asarray(of_stable_rank(r)) for r in (2.0, 5.0)])
    watch = SettledRanks.of({"stack": stack})
    np.testing.assert_allclose(watch.series["stack"], (5.0,), rtol=1e-5)
    with pytest.raises(ValueError, match="where= of SettledRanks chose none of stack"):
        SettledRanks.of({"stack": stack}, where=lambda path, shape: False)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SettledRanks.of({"stack": stack}, window=0)


def test_the_volume_of_a_box_is_least_along_principal_axes(getkey, x64):
    """Without an offset it is at least det(cov)^(1/2n): Hadamard's inequality."""
    scales = jnp.array([2.0, 0.7, 0.2])
    z = jr.normal(getkey(), (500, 3), jnp.float64) * scales[None, :]
    z = z @ jr.normal(getkey(), (3, 3), jnp.float64)
    cov = np.cov(np.asarray(z).T, bias=True)
    least = np.linalg.det(cov) ** (1 / 6)
    axes = np.linalg.eigh(cov)[1]
    np.testing.assert_allclose(latent_volume(z @ axes, 0.0), least, rtol=1e-10)
    turn = np.linalg.qr(np.asarray(jr.normal(getkey(), (3, 3), jnp.float64)))[0]
    assert latent_volume(z @ turn, 0.0) > least * (1 - 1e-12)
    np.testing.assert_allclose(latent_volume(3 * z, 0.0), 3 * latent_volume(z, 0.0))


def test_the_volume_has_a_gradient_at_empty_axes():
    z = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    slope = jax.grad(latent_volume)(z)
    assert np.isfinite(slope).all()
    # √2 with d√((1 + s)(1 + 0)) = ds / (2 √2), and s falls by ½ for each of two samples.
    np.testing.assert_allclose(slope[:, 0], [-(2**0.5) / 8, 2**0.5 / 8], rtol=1e-6)
