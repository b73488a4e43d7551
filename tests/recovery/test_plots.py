"""What the pictures of fits show, and how much variance their components explain."""

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.decomposition import PCA

import lrjax
from lrjax import recovery
from lrjax.lowrank import TuckerForm


M, N, RANK, NOISE = 60, 40, 3, 0.1
OFFSET = 2.0


@jax.jit
def table(key):
    """A matrix, also with noise and with gross errors on top."""
    keys = jr.split(key, 6)
    clean = jr.normal(keys[0], (M, RANK)) @ jr.normal(keys[1], (RANK, N)) + OFFSET
    noisy = clean + NOISE * jr.normal(keys[2], (M, N))
    wrong = jr.bernoulli(keys[3], 0.05, (M, N))
    dirty = noisy + jnp.where(wrong, 10 * jr.normal(keys[4], (M, N)), 0)
    holes = jr.bernoulli(keys[5], 0.3, (M, N))
    return noisy, dirty, wrong, jnp.where(holes, jnp.nan, noisy)


@pytest.fixture(scope="module")
def drawn():
    return table(jr.key(0))


@pytest.fixture(scope="module")
def separated(drawn):
    return jax.jit(lrjax.fit_robust_pca)(drawn[1])


@pytest.fixture(scope="module")
def completed(drawn):
    return jax.jit(lrjax.fit_completion)(drawn[3])


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.slow
def test_ratios_are_those_of_pca_without_gross_errors(drawn, separated, completed):
    """Up to what errors and gaps cost, which is of the order of the noise's share.

    The noise of a separation is that of its predictions, a fifth too large here.
    """
    want = PCA().fit(np.asarray(drawn[0])).explained_variance_ratio_
    noise = want[RANK:].sum()
    for fit in (separated, completed):
        ratio = np.asarray(fit.explained_variance_ratio)
        np.testing.assert_allclose(ratio[:RANK], want[:RANK], atol=5 * noise)
        np.testing.assert_allclose(1 - ratio.sum(), noise, rtol=0.7)
        assert np.all(np.diff(ratio) <= 1e-6)


@pytest.mark.slow
def test_ratios_under_vmap(separated):
    fits = jax.tree.map(lambda x: jnp.stack([x, x]), separated)
    many = jax.vmap(lambda fit: fit.explained_variance_ratio)(fits)
    np.testing.assert_allclose(many[1], separated.explained_variance_ratio, rtol=1e-4)
    with pytest.raises(ValueError, match=r"one fit, got a batch \(2,\)"):
        fits.plot()


def test_a_separation_is_drawn(drawn, separated):
    figure = separated.plot()
    scree, sizes = figure.axes
    np.testing.assert_allclose(scree.lines[0].get_ydata(), separated.values[: RANK + 1])
    assert scree.get_yscale() == "log"
    assert scree.lines[2].get_ydata()[0] < 0.1 * separated.values[RANK]
    assert list(scree.lines[1].get_xdata()) == [RANK + 1.5] * 2
    assert legend(scree) == ["rank 4", "noise alone"]  # the offset is one
    share = float(jnp.mean(separated.sparse != 0))
    assert abs(share - float(jnp.mean(drawn[2]))) < 0.02
    named = {
        "low-rank part",
        f"gross errors, {share:.2g} of the entries",
        "error of entries held out",
        "noise",
    }
    assert set(legend(sizes)) == named
    heights = [sum(bar.get_height() for bar in group) for group in sizes.containers]
    np.testing.assert_allclose(heights, [1, share], rtol=1e-3)
    assert figure.get_suptitle().endswith("steps, trusted")
    plt.close(figure)


@pytest.mark.slow
def test_a_completion_is_drawn_beside_its_effects(completed):
    figure = completed.plot()
    scree, sizes = figure.axes
    values = scree.lines[0].get_ydata()
    assert len(values) == int(completed.rank) == RANK
    # The offset is the largest direction of the whole matrix.
    whole = jnp.linalg.svd(completed.low_rank.materialize(), compute_uv=False)
    assert values[0] < 0.9 * whole[0]
    levels = {line.get_label(): line.get_xdata()[0] for line in sizes.lines}
    np.testing.assert_allclose(levels["noise"], completed.noise, rtol=1e-5)
    assert levels["error of entries held out"] == float(completed.held_out_error)
    plt.close(figure)


@pytest.mark.slow
def test_a_tensor_is_drawn_axis_by_axis():
    factors = [jnp.eye(n)[:, :2] for n in (6, 5, 4)]
    core = jnp.zeros((2, 2, 2)).at[0, 0, 0].set(3.0).at[1, 1, 1].set(2.0)
    low_rank = TuckerForm(core, factors)
    fit = recovery.TensorFit(
        low_rank,
        center=jnp.array(0.0),
        sparse=jnp.zeros((6, 5, 4)),
        ranks=jnp.array([2, 2, 2]),
        residual=jnp.array(1e-7),
        held_out_error=jnp.array(jnp.inf),
        steps=jnp.array(9),
        converged=jnp.array(False),
        trusted=jnp.array(False),
    )
    figure = fit.plot()
    scree, sizes = figure.axes
    assert legend(scree) == [f"axis {k}: rank 2" for k in range(3)]
    for k in range(3):
        np.testing.assert_allclose(scree.lines[2 * k].get_ydata(), [3, 2], rtol=1e-6)
    assert len(sizes.lines) == 0  # an infinite error has no place
    assert figure.get_suptitle() == "not converged after 9 steps, not to be trusted"
    plt.close(figure)
