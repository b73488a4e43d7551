"""Self-expressions against their optimality conditions, scikit-learn and closed forms."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import ElasticNet

from lrjax import clustering

from .problems import union


sparse = jax.jit(
    clustering.sparse_self_expression,
    static_argnames=("affine", "max_support", "relative", "max_steps"),
)
low_rank = jax.jit(clustering.low_rank_self_expression)
ridge = jax.jit(clustering.ridge_self_expression, static_argnames=("zero_diagonal",))


ONES = np.ones(2, int)


def rng_of(getkey):
    return np.random.default_rng(int(jax.random.key_data(getkey())[-1]))


def conditions(x, found, tau, affine):
    """By how much the optimality conditions fail, in units of τ, written out anew."""
    c, gamma = np.asarray(found.coefficients), np.asarray(found.fit_weight)
    worst = 0.0
    for j in range(len(x)):
        others = np.arange(len(x)) != j
        slope = gamma[j] * x[others] @ (x[j] - c[j] @ x) - (1 - tau) * c[j, others]
        used = c[j, others] != 0
        signs = np.sign(c[j, others])
        if affine:
            slope = slope - np.mean((slope - tau * signs)[used])
            assert abs(c[j].sum() - 1) < 1e-8
        assert c[j, j] == 0
        assert used.any()
        inside = np.abs(slope - tau * signs)[used].max()
        outside = np.abs(slope[~used]).max(initial=0) - tau
        worst = max(worst, inside / tau, outside / tau)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("affine", [False, True])
def test_optimality(affine, getkey, x64):
    """The lasso, the elastic net, and samples that outnumber no dimension."""
    rng = rng_of(getkey)
    for d, tau in ((8, 1.0), (8, 0.7), (50, 1.0)):
        x, _ = union(rng, (2, 3), d, 15, noise=0.2, offset=float(affine))
        found = sparse(x, l1_ratio=tau, affine=affine)
        assert found.converged
        assert conditions(x, found, tau, affine) < 1e-6
        reported = np.asarray(found.residual).max()
        assert reported < 1e-6


def test_the_same_as_scikit_learn_sample_by_sample(getkey, x64):
    rng = rng_of(getkey)
    x, _ = union(rng, (2, 3), 8, 15, noise=0.2)
    for tau in (1.0, 0.7):
        found = sparse(x, l1_ratio=tau)
        for j in range(0, 30, 6):
            others = np.arange(30) != j
            alpha = 1 / (float(found.fit_weight[j]) * 8)
            peer = ElasticNet(
                alpha=alpha, l1_ratio=tau, fit_intercept=False, tol=1e-14, max_iter=10**6
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it does not reach such a tolerance
                peer.fit(x[others].T, x[j])
            ours = np.asarray(found.coefficients)[j, others]
            np.testing.assert_allclose(ours, peer.coef_, atol=1e-6)
            assert ((np.abs(peer.coef_) > 1e-6) == (np.abs(ours) > 1e-6)).all()


@pytest.mark.slow
def test_affine_coefficients_do_not_see_where_the_origin_is(getkey, x64):
    x, _ = union(rng_of(getkey), (1, 2), 8, 15, noise=0.2)
    here, there = sparse(x, affine=True), sparse(x + 5.0, affine=True)
    np.testing.assert_allclose(here.coefficients, there.coefficients, atol=1e-9)


@pytest.mark.slow
def test_order_and_length_of_samples(getkey, x64):
    """Permuted samples, permuted coefficients; a longer sample needs more of the others."""
    rng = rng_of(getkey)
    x, _ = union(rng, (2, 3), 8, 15, noise=0.2)
    c = np.asarray(sparse(x).coefficients)
    order = rng.permutation(len(x))
    permuted = np.asarray(sparse(x[order]).coefficients)
    np.testing.assert_allclose(permuted, c[order][:, order], atol=1e-9)
    np.testing.assert_allclose(sparse(1e3 * x).coefficients, c, atol=1e-9)


@pytest.mark.slow
def test_subspaces_are_kept_apart(getkey, x64):
    """Without noise, independent subspaces: by the few in their own, and next to nothing
    else: what the weight of the fit leaves open."""
    x, labels = union(rng_of(getkey), (2, 3), 50, 15)
    other = labels[:, None] != labels[None, :]
    found = sparse(x, fit_weight=1e4)
    assert found.converged
    sizes = np.abs(np.asarray(found.coefficients))
    assert sizes[other].sum() < 1e-2 * sizes.sum()
    assert np.abs(np.asarray(low_rank(x, fit_weight=jnp.inf)))[other].max() < 1e-12


@pytest.mark.slow
def test_a_weight_of_one_uses_nothing(getkey):
    x, _ = union(rng_of(getkey), (2, 3), 8, 15, noise=0.2)
    found = sparse(x, fit_weight=0.999)
    assert not np.asarray(found.coefficients).any()
    assert np.asarray(sparse(x, fit_weight=1.1).coefficients).any(axis=1).all()


@pytest.mark.slow
def test_vmap_over_the_weight_and_single_precision(getkey):
    x, _ = union(rng_of(getkey), (2, 3), 8, 15, noise=0.2)
    weights = jnp.array([5.0, 50.0])
    many = jax.jit(jax.vmap(lambda w: clustering.sparse_self_expression(x, fit_weight=w)))
    found = many(weights)
    assert found.converged.all()
    for i, weight in enumerate(weights):
        one = sparse(x, fit_weight=weight)
        assert one.coefficients.dtype == jnp.float32
        assert one.converged
        # Conditions to ε·γ-fold rounding, solutions to that times a condition number.
        np.testing.assert_allclose(found.coefficients[i], one.coefficients, atol=2e-3)


@pytest.mark.slow
def test_samples_that_are_zero_or_alike(getkey):
    x, _ = union(rng_of(getkey), (2, 3), 8, 15, noise=0.2)
    x[3] = 0
    x[4] = x[5]
    for affine in (False, True):
        found = sparse(x, affine=affine)
        assert found.converged
        assert np.isfinite(found.coefficients).all()
        assert affine or not np.asarray(found.coefficients)[3].any()
    assert np.isfinite(sparse(0 * x).coefficients).all()


@pytest.mark.slow
def test_what_has_not_converged_says_so(getkey):
    x, _ = union(rng_of(getkey), (2, 3), 8, 15, noise=0.2)
    assert not sparse(x, max_support=1).converged
    found = sparse(x, max_steps=2)
    assert not found.converged
    assert found.steps == 2


def test_low_rank_is_the_minimum_of_its_objective(getkey, x64):
    """Proximal gradient descent comes to the same place."""
    rng = rng_of(getkey)
    x = rng.standard_normal((12, 9)) * np.linspace(1, 2, 9)
    g, tau = x @ x.T, 3 / np.linalg.norm(x, 2) ** 2
    rate, c = 1 / (tau * np.linalg.norm(g, 2)), np.zeros((12, 12))
    for _ in range(3000):
        u, s, vt = np.linalg.svd(c - rate * tau * (c @ g - g))
        c = u * np.maximum(s - rate, 0) @ vt
    np.testing.assert_allclose(low_rank(x, fit_weight=3.0), c, atol=1e-9)
    absolute = clustering.low_rank_self_expression(x, fit_weight=tau, relative=False)
    np.testing.assert_allclose(absolute, c, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 5), (6, 9)])
def test_ridge_solves_the_normal_equations(shape, getkey, x64):
    x = rng_of(getkey).standard_normal(shape)
    n, gamma = len(x), 20 / np.linalg.norm(x, 2) ** 2
    c = np.asarray(ridge(x, fit_weight=20.0))
    for j in range(n):
        others = np.arange(n) != j
        y = x[others]
        right = np.linalg.solve(y @ y.T + np.eye(n - 1) / gamma, y @ x[j])
        np.testing.assert_allclose(c[j, others], right, atol=1e-10)
    assert not np.diagonal(c).any()
    free = np.linalg.solve(x @ x.T + np.eye(n) / gamma, x @ x.T)
    np.testing.assert_allclose(
        ridge(x, fit_weight=20.0, zero_diagonal=False), free, atol=1e-10
    )


@pytest.mark.slow
def test_affinity_is_a_graph(getkey):
    c = rng_of(getkey).standard_normal((7, 7)).astype(np.float32)
    graph = np.asarray(clustering.affinity(c, keep=3))
    np.testing.assert_array_equal(graph, graph.T)
    assert not np.diagonal(graph).any()
    scaled = clustering.affinity(
        c * np.linspace(1, 5, 7, dtype=np.float32)[:, None], keep=3
    )
    np.testing.assert_allclose(scaled, graph, rtol=1e-5)
    lonely = np.asarray(clustering.affinity(np.zeros((3, 3), np.float32)))
    assert not lonely.any()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: clustering.sparse_self_expression(x, l1_ratio=0.0), "ridge_self"),
        (lambda x: clustering.sparse_self_expression(x, fit_weight=-1.0), "positive"),
        (lambda x: clustering.sparse_self_expression(x, max_support=9), "at most 3"),
        (lambda x: clustering.low_rank_self_expression(x[:1]), "at least 2"),
        (lambda x: clustering.affinity(x @ x.T, keep=0), "keep"),
        (lambda x: clustering.clustering_error(ONES, ONES[:1]), "one length"),
    ],
)
def test_refusals(call, error):
    with pytest.raises(Exception, match=error):
        call(np.ones((4, 2), np.float32))
