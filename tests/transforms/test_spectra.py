"""What shapes singular values: proximal map, subgradient, projection, decay of products."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import linalg
from tests.helpers import assert_close, random_low_rank, relative_error, with_spectrum
from tests.reference import spectra as reference


every_matrix = lambda path, shape: len(shape) >= 2


@jax.jit
def prox(x, level):
    return linalg.map_singular_values(lambda s: linalg.soft_threshold(s, level), x)


@jax.jit
def subgradient(x):
    tx = lrjax.add_nuclear_norm(1.0, where=every_matrix)
    return tx.update(jnp.zeros_like(x), tx.init(x), x)[0]


def nuclear(x):
    return np.linalg.svd(np.asarray(x), compute_uv=False).sum()


def test_the_proximal_map_and_what_it_leaves(getkey, x64):
    """Optimality, Moreau's decomposition, and exact zeros."""
    x = with_spectrum(getkey(), 7, 5, [3.0, 2.0, 0.9, 0.3, 0.0], jnp.float64)
    p = prox(x, 1.0)
    rest = np.asarray(x - p)
    # The rest is the projection on the spectral ball: min(σ, 1) ...
    assert_close(rest, reference.spectral(np.asarray(x), lambda s: np.minimum(s, 1)))
    assert np.linalg.norm(rest, 2) <= 1 + 1e-12
    # ... and a subgradient at the proximal point: ⟨rest, p⟩ = ‖p‖_*.
    np.testing.assert_allclose(np.sum(rest * np.asarray(p)), nuclear(p), rtol=1e-12)
    values = np.linalg.svd(np.asarray(p), compute_uv=False)
    np.testing.assert_allclose(values[:2], [2.0, 1.0], rtol=1e-12)
    assert values[2:].max() < 1e-14
    # No point nearby has a smaller ½‖y − x‖² + ‖y‖_*.
    cost = lambda y: 0.5 * np.sum((y - np.asarray(x)) ** 2) + nuclear(y)
    for scale in (1e-3, 1.0):
        noise = scale * np.asarray(jr.normal(getkey(), (20, 7, 5), jnp.float64))
        assert min(cost(np.asarray(p) + n) for n in noise) > cost(np.asarray(p))


def test_the_subgradient_is_the_one_of_least_norm(getkey, x64):
    x = with_spectrum(getkey(), 4, 6, [3.0, 0.1], jnp.float64)
    g = np.asarray(subgradient(x))
    np.testing.assert_allclose(np.sum(g**2), 2, rtol=1e-12)  # the rank, not min(m, n)
    np.testing.assert_allclose(np.sum(g * np.asarray(x)), nuclear(x), rtol=1e-12)
    assert not np.any(np.asarray(subgradient(jnp.zeros_like(x))))
    y = jr.normal(getkey(), (4, 6), jnp.float64)
    assert nuclear(y) >= nuclear(x) + np.sum(g * np.asarray(y - x)) - 1e-12
    # In single precision the values that rounding makes are none.
    single = np.asarray(subgradient(x.astype(jnp.float32)), np.float64)
    assert relative_error(single, g) < 1e-3


def test_no_rank_is_made_up_of_rounding():
    ones = jnp.ones((64, 48), jnp.bfloat16)
    got = subgradient(ones)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), (64 * 48) ** -0.5, rtol=1e-2)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_energy_mask_is_that_of_its_definition(getkey, x64, energy):
    values = jnp.sort(0.05 + jr.uniform(getkey(), (20, 6), jnp.float64) ** 3)[:, ::-1]
    counts = linalg.energy_mask(values, energy).sum(-1)
    assert counts.tolist() == [reference.kept(np.asarray(v), energy) for v in values]
    assert not linalg.energy_mask(jnp.zeros(3), energy).any()


def test_hard_thresholding_is_the_dense_loop(getkey):
    """Of the singular values of each step, against NumPy; at full rank nothing is cut."""
    x, g = (np.asarray(jr.normal(getkey(), (3, 7, 5))) for _ in range(2))
    for rank in (2, 5):
        tx = lrjax.keep_rank(rank, where=every_matrix)
        got = x + np.asarray(jax.jit(tx.update)(-g, tx.init(x), x)[0])
        u, s, vt = np.linalg.svd(x - g, full_matrices=False)
        want = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
        assert_close(got, want, condition=1e3)
    with pytest.raises(ValueError, match="keep_rank needs a rank of at least 1, got 0"):
        lrjax.keep_rank(0)


@pytest.mark.slow
def test_hard_thresholding_recovers_a_sensed_matrix():
    """The dense baseline of recovery: singular value projection on matrix sensing."""
    problem = lrjax.matrix_sensing(jr.key(0), (12, 10), 2, measurements=200)
    residual = lambda x: problem.residual(lrjax.LowRank(x, jnp.eye(10)))
    loss = lambda x: jnp.sum(residual(x) ** 2) / 2
    # Steps a little below one over the mean curvature of the measurements.
    rate = 0.7 * 120 / jnp.sum(problem.operator.matrices**2)
    tx = optax.chain(optax.sgd(rate), lrjax.keep_rank(2, where=every_matrix))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return (x + updates, state), None

    @jax.jit
    def run(x):
        return jax.lax.scan(step, (x, tx.init(x)), length=150)[0][0]

    x = lrjax.LowRank(run(jnp.zeros((12, 10))), jnp.eye(10))
    assert problem.relative_error(x) < 1e-4


@pytest.mark.slow
def test_proximal_gradient_ends_at_the_penalized_minimum(getkey, x64):
    """On ½‖A(W) − b‖²: −G is a subgradient of the penalty, and the rank has fallen."""
    a = jr.normal(getkey(), (30, 40), jnp.float64) / 30**0.5
    truth = random_low_rank(getkey(), 5, 8, 1, dtype=jnp.float64).materialize()
    b, weight = a @ truth.ravel(), 0.1
    slope = lambda w: (a.T @ (a @ w.ravel() - b)).reshape(w.shape)
    rate = 1 / float(np.linalg.norm(np.asarray(a), 2)) ** 2
    tx = lrjax.proximal_gradient(rate, nuclear_weight=weight, where=every_matrix)

    @jax.jit
    def fitted(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(slope(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=3000)[0][0]

    w = fitted(jr.normal(getkey(), (5, 8), jnp.float64))
    assert int(lrjax.metrics.numerical_rank(w, 1e-9)) < 5
    g = -np.asarray(slope(w)) / weight
    assert np.linalg.norm(g, 2) < 1 + 1e-5
    np.testing.assert_allclose(np.sum(g * np.asarray(w)), nuclear(w), rtol=1e-5)


def test_trp_is_that_of_its_reference(getkey, x64):
    settings = {"energy": 0.9, "period": 3, "nuclear_weight": 0.05}
    target = jr.normal(getkey(), (6, 5), jnp.float64)
    w = jr.normal(getkey(), (6, 5), jnp.float64)
    tx = lrjax.trp(0.05, where=every_matrix, **settings)

    @jax.jit
    def path(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(w - target, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(step, (w, tx.init(w)), length=12)[1]

    grad = lambda w: w - np.asarray(target)
    want = reference.trp(np.asarray(w), grad, rate=0.05, steps=12, **settings)
    assert_close(path(w), np.stack(list(want)), condition=1e4)


def test_trp_leaves_a_tree_without_matrices_alone():
    params = {"head": jnp.ones((12, 12)), "bias": jnp.ones(3)}
    tx = lrjax.trp(0.1, period=1, inner=optax.identity())
    updates, _ = tx.update(params, tx.init(params), params)
    assert_close(updates, jax.tree.map(lambda x: -0.1 * x, params))


def test_matrices_are_those_that_a_rule_names_and_no_factors(getkey):
    conv = jr.normal(getkey(), (4, 3, 2, 2))
    tree = {"conv": conv, "pair": random_low_rank(getkey(), 9, 9, 8), "bias": jnp.ones(9)}
    rule = lambda path, shape: (
        lrjax.MatrixSpec((0,), (1, 2, 3)) if path == "conv" else False
    )
    seen = []

    def halved(x, y):
        seen.append((x.shape, y.shape))
        return x / 2

    got = lrjax.transforms.on_matrices(halved, rule)(tree, tree)
    assert seen == [((4, 12), (4, 12))]
    assert_close(got, {**tree, "conv": conv / 2})
    # Factors are wide enough for the default rule, and yet are none of its matrices.
    assert_close(lrjax.transforms.on_matrices(halved)(tree, tree), tree)


def test_frobenius_decay_is_the_gradient_of_the_product(getkey, x64):
    x = random_low_rank(getkey(), 6, 5, 3, batch=(2,), dtype=jnp.float64)
    zero = jax.tree.map(jnp.zeros_like, x)
    tx = lrjax.add_frobenius_decay(0.3)
    got, _ = jax.jit(lambda x: tx.update(zero, tx.init(x), x))(x)
    assert_close(got, jax.grad(lambda x: 0.15 * jnp.sum(x.materialize() ** 2))(x))


def test_a_spectral_start_is_the_best_of_its_rank(getkey):
    """What a layer in factors starts from beside Frobenius decay."""
    dense = jr.normal(getkey(), (9, 6)) / 3
    x = lrjax.truncate(dense, 2)
    u, s, vt = np.linalg.svd(np.asarray(dense), full_matrices=False)
    assert relative_error(x.materialize(), (u[:, :2] * s[:2]) @ vt[:2]) < 1e-5
    np.testing.assert_allclose(x.left.T @ x.left, x.right.T @ x.right, atol=1e-5)


def test_the_penalized_rank_is_the_best_of_all(getkey, x64):
    values = jnp.sort(3 * jr.uniform(getkey(), (30, 5), jnp.float64))[:, ::-1]
    got = linalg.penalized_rank(values, (30, 5, 7), 0.1)
    square = np.asarray(values) ** 2
    cost = np.stack([0.1 * r * 12 + square[:, r:].sum(-1) / 2 for r in range(6)], axis=-1)
    assert got.tolist() == cost.argmin(-1).tolist()
    assert len(set(got.tolist())) > 2


def test_weights_and_ranks_are_those_of_learning_compression(getkey, x64):
    settings = {"rank_weight": 0.02, "penalty": 0.3, "penalty_growth": 1.4, "period": 4}
    target = with_spectrum(getkey(), 6, 5, [3.0, 1.5, 0.5, 0.4, 0.3], jnp.float64)
    w = target + jr.normal(getkey(), (6, 5), jnp.float64) / 10
    tx = optax.chain(lrjax.pull_to_low_rank(where=every_matrix, **settings), optax.sgd(0.1))

    @jax.jit
    def path(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(w - target, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(step, (w, tx.init(w)), length=24)[1]

    grad = lambda w: w - np.asarray(target)
    want = reference.learning_compression(
        np.asarray(w), grad, rate=0.1, steps=24, **settings
    )
    # The state counts in float32, as the penalty does.
    assert_close(path(w), np.stack(list(want)), rtol=1e-5)


def test_weights_end_in_their_copies_and_at_the_hard_threshold(getkey, x64):
    """Of ½‖W − T‖² + C(rank): values with σ² > 2 C per rank stay, the others go."""
    target = with_spectrum(getkey(), 6, 5, [3.0, 2.0, 1.0, 0.5, 0.2], jnp.float64)
    pull = lrjax.pull_to_low_rank(
        0.125, penalty=0.1, penalty_growth=1.2, period=10, where=every_matrix
    )
    rate = lambda t: 1 / (1 + 0.3 * 1.2 ** (t / 10))  # below one over the curvature
    tx = optax.chain(pull, optax.scale_by_learning_rate(rate))

    @jax.jit
    def trained(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(w - target, state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=400)[0]

    w, (state, _) = trained(target)
    assert relative_error(w, state.target) < 1e-3
    u, s, vt = np.linalg.svd(np.asarray(target))
    kept = s**2 > 2 * 0.125 * 11
    assert kept.sum() == 2
    assert relative_error(w, (u[:, :2] * s[:2]) @ vt[:2]) < 1e-2
