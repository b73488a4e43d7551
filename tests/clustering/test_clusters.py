"""K subspaces, low-rank mixtures, the coding rate and the estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from lrjax import clustering
from lrjax.clustering.sklearn import SubspaceClustering

from .problems import union


fit_planes = jax.jit(
    clustering.k_subspaces,
    static_argnames=("n_clusters", "dim", "affine", "restarts", "max_steps"),
)
fit_mixture = jax.jit(
    clustering.fit_low_rank_mixture,
    static_argnames=("n_components", "rank", "restarts", "max_steps"),
)


def rng_of(getkey):
    return np.random.default_rng(int(jax.random.key_data(getkey())[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("affine", [False, True])
def test_planted_subspaces_are_found(affine, getkey, x64):
    x, labels = union(rng_of(getkey), (2, 2, 2), 12, 30, noise=0.01, offset=2.0 * affine)
    found = fit_planes(x, 3, 2, affine=affine, key=getkey())
    assert found.trusted
    assert found.converged
    # Samples near the origin are near every subspace.
    assert clustering.clustering_error(found.labels, labels) <= 0.05
    np.testing.assert_allclose(found.cost, found.costs.min(), rtol=1e-9)
    assert 2 / 16 <= found.agreement <= 1
    np.testing.assert_array_equal(found.predict(x), found.labels)
    # The cost is that of a principal component analysis of each cluster.
    best = 0.0
    for k in range(3):
        own = x[np.asarray(found.labels) == k]
        own = own - own.mean(axis=0) * affine
        best += np.sum(np.linalg.svd(own, compute_uv=False)[2:] ** 2)
    np.testing.assert_allclose(found.cost, best / len(x), rtol=1e-6)


@pytest.mark.slow
def test_one_subspace_is_a_principal_component_analysis(getkey, x64):
    x = rng_of(getkey).standard_normal((40, 6)) * np.array([9.0, 6.0, 1, 1, 1, 1])
    found = fit_planes(x, 1, 2, restarts=2, key=getkey())
    right = np.linalg.svd(x)[2][:2].T
    projector = found.bases[0] @ found.bases[0].T
    np.testing.assert_allclose(projector, right @ right.T, atol=1e-6)
    assert found.agreement == 1


@pytest.mark.slow
def test_restarts_that_disagree_are_not_trusted(getkey):
    """Noise has no subspaces: every restart ends elsewhere."""
    x = rng_of(getkey).standard_normal((90, 12)).astype(np.float32)
    found = fit_planes(x, 3, 2, key=getkey())
    assert not found.trusted
    assert found.agreement == 1 / 16
    assert np.unique(np.asarray(found.costs)).size == 16


@pytest.fixture
def mixture(getkey):
    normal = rng_of(getkey).standard_normal
    return clustering.LowRankMixture(
        jnp.array([0.2, 0.5, 0.3]),
        jnp.asarray(normal((3, 5))),
        jnp.asarray(normal((3, 5, 2))),
        jnp.array([0.1, 0.2, 0.05]),
    )


def test_density_is_that_of_dense_gaussians(x64, mixture, getkey):
    x, total = rng_of(getkey).standard_normal((4, 5)), np.zeros(4)
    parts = (mixture.shares, mixture.means, mixture.factors, mixture.noise)
    for p, mean, w, s in zip(*map(np.asarray, parts), strict=True):
        c = w @ w.T + (s**2 + 0.3**2) * np.eye(5)
        rest = x - mean
        inner = np.sum(rest * np.linalg.solve(c, rest.T).T, axis=1)
        total += p * np.exp(-inner / 2) / np.sqrt(np.linalg.det(2 * np.pi * c))
    ours = jax.jit(lambda x, sigma: mixture.log_density(x, sigma))(x, 0.3)
    np.testing.assert_allclose(ours, np.log(total), rtol=1e-10)


def test_denoiser_is_tweedies(x64, mixture, getkey):
    """``E[x | y] = y + σ² ∇ log p_σ(y)``, whatever the noise."""
    y = 3 * rng_of(getkey).standard_normal((4, 5))

    @jax.jit
    def both(sigma):
        score = jax.grad(lambda y: jnp.sum(mixture.log_density(y, sigma)))(jnp.asarray(y))
        return mixture.denoise(y, sigma), y + sigma**2 * score

    for sigma in (0.01, 1.0, 30.0):
        ours, tweedie = both(sigma)
        np.testing.assert_allclose(ours, tweedie, atol=1e-10)


@pytest.mark.slow
def test_likelihood_rises_to_the_closed_form(getkey, x64):
    """One component: probabilistic PCA, an eigendecomposition of the covariance."""
    x = rng_of(getkey).standard_normal((60, 6)) * np.array([4.0, 3.0, 1, 1, 1, 1])
    fit = fit_mixture(x, 1, 2, restarts=1, tol=1e-12, key=getkey())
    history = np.asarray(fit.history)
    assert (np.diff(history) > -1e-10).all()
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    noise = values[:4].mean()
    logdet = np.sum(np.log(values[4:])) + 4 * np.log(noise)
    best = -(6 * np.log(2 * np.pi) + logdet + 6) / 2
    np.testing.assert_allclose(fit.log_density, best, rtol=1e-8)
    np.testing.assert_allclose(fit.mixture.noise[0] ** 2, noise, rtol=1e-4)
    assert fit.converged


@pytest.mark.slow
def test_a_planted_mixture_is_found(getkey, x64):
    x, labels = union(rng_of(getkey), (2, 2), 8, 60, noise=0.1, offset=1.0)
    fit = fit_mixture(x, 2, 2, key=getkey())
    assert clustering.clustering_error(fit.labels, labels) <= 0.05
    history = np.asarray(fit.history)
    assert (np.diff(history) > -1e-10).all()
    # 8 numbers share noise² = 0.01; a variance of 480 residual numbers is known to a tenth.
    np.testing.assert_allclose(fit.mixture.noise, 0.1 / np.sqrt(8), rtol=0.2)
    clean = fit_mixture(x.astype(np.float32) * 0 + 1, 2, 2, key=getkey())
    assert np.isfinite(clean.log_density)


def test_coding_rate_is_that_of_the_singular_values(getkey, x64):
    rng, rate = rng_of(getkey), jax.jit(clustering.coding_rate)
    for n, d in ((9, 4), (4, 9)):
        z, w = rng.standard_normal((n, d)), rng.uniform(size=n)
        for member, weights in ((None, np.ones(n)), (w, w)):
            s = np.linalg.svd(np.sqrt(weights)[:, None] * z, compute_uv=False)
            right = np.sum(np.log1p(d * s**2 / (weights.sum() * 0.5**2))) / 2
            ours = rate(z, distortion=0.5, member=member)
            np.testing.assert_allclose(ours, right, rtol=1e-10)


@pytest.mark.slow
def test_reduction_is_for_the_right_groups(getkey, x64):
    x, labels = union(rng_of(getkey), (2, 2), 8, 20)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    gain = jax.jit(clustering.coding_rate_reduction)
    right = gain(x, np.eye(2)[labels])
    wrong = gain(x, np.eye(2)[np.arange(40) % 2])
    assert right > wrong > 0
    np.testing.assert_allclose(gain(x, np.ones((40, 1))), 0, atol=1e-12)
    slopes = jax.jit(jax.grad(clustering.coding_rate_reduction, argnums=(0, 1)))
    for samples in (x, 0 * x):
        assert all(np.isfinite(g).all() for g in slopes(samples, np.eye(2)[labels]))


@pytest.mark.slow_but("low_rank")
@pytest.mark.parametrize("method", ["sparse", "low_rank", "ridge"])
def test_estimator_finds_planted_subspaces(method, getkey):
    x, labels = union(rng_of(getkey), (2, 2), 20, 20, noise=0.05)
    estimator = SubspaceClustering(2, method=method, keep=10, random_state=0)
    found = estimator.fit_predict(x.astype(np.float32))
    assert clustering.clustering_error(found, labels) <= 0.1  # samples near the origin
    assert estimator.converged_
    assert estimator.affinity_matrix_.shape == (40, 40)


@pytest.mark.slow
def test_estimator_is_one():
    """scikit-learn's own checks, each on samples of its own shape."""
    for result in check_estimator(SubspaceClustering(2), on_skip=None):
        assert result["status"] in ("passed", "skipped"), result


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x, key: clustering.k_subspaces(x, 2, 4, key=key), "dim"),
        (lambda x, key: clustering.k_subspaces(x, 9, 1, key=key), "n_clusters"),
        (lambda x, key: clustering.fit_low_rank_mixture(x, 2, 0, key=key), "rank"),
        (lambda x, key: clustering.coding_rate_reduction(x, x[:2]), "one-hot"),
        (lambda x, key: SubspaceClustering(2, method="oracle").fit(x), "oracle"),
    ],
)
def test_refusals(call, error, getkey):
    with pytest.raises(Exception, match=error):
        call(np.ones((5, 4), np.float32), getkey())
