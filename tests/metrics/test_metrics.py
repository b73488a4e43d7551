import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import LowRank, metrics, project_out

from ..helpers import assert_close, random_low_rank, with_spectrum


# Each is one program for all arguments of one shape.
stable_rank, effective_rank = jax.jit(metrics.stable_rank), jax.jit(metrics.effective_rank)
crossing_time, fitted_rate = jax.jit(metrics.crossing_time), jax.jit(metrics.fitted_rate)
imbalance = jax.jit(metrics.imbalance)
hessian_overlap = eqx.filter_jit(metrics.hessian_overlap)
hessian_space = eqx.filter_jit(metrics.hessian_space)
intruder_dimensions = jax.jit(metrics.intruder_dimensions, static_argnames="top")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.slow
@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.3, np.pi / 2])
def test_misalignment_of_two_lines_at_an_angle(x64, angle):
    x = jnp.array([[1.0], [0.0], [0.0]])
    y = jnp.array([[np.cos(angle)], [np.sin(angle)], [0.0]])
    want = 2 * np.sin(angle / 2) ** 2
    assert_close(metrics.misalignment(x, y), jnp.array(want), condition=10)
    # A space that holds the other is aligned with it; the scale of the columns is free.
    assert metrics.misalignment(jnp.concatenate([x, y + 1], 1), -3 * x) < 1e-25


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("factorized", [False, True])
def test_ranks_of_a_known_spectrum(x64, factorized):
    values = jnp.array([4.0, 2.0, 1.0])
    x = with_spectrum(jr.key(0), 7, 5, values, jnp.float64)
    if factorized:
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        x = LowRank(*map(jnp.asarray, (u[:, :3] * s[:3], vt[:3].T)))
    assert_close(metrics.singular_values(x)[:3], values)
    assert_close(stable_rank(x), jnp.array(21 / 16))
    p = np.array([4, 2, 1]) / 7
    assert_close(effective_rank(x), jnp.array(np.exp(-np.sum(p * np.log(p)))), rtol=1e-12)


@pytest.mark.slow
def test_ranks_are_free_of_scale_and_zero_at_zero():
    x = random_low_rank(jr.key(0), 6, 5, 2, batch=(3,))
    scaled = LowRank(*(jnp.asarray(1e-18 * np.asarray(f)) for f in (x.left, x.right)))
    for rank in (stable_rank, effective_rank):
        assert_close(rank(scaled), rank(x), condition=100)
        dense = np.asarray(x.left) @ np.asarray(x.right).swapaxes(1, 2)
        assert_close(rank(x), np.stack([rank(m) for m in dense]), rtol=1e-3)
        assert rank(jnp.zeros((3, 2))) == 0


def test_balance_is_zero_after_balancing_and_drift_knows_batches(x64):
    import lrjax

    x = random_low_rank(jr.key(0), 6, 5, 2, dtype=jnp.float64)
    assert np.max(np.abs(imbalance(jax.jit(lrjax.balance)(x)))) < 1e-12
    path = jax.tree.map(lambda f: jnp.asarray(np.stack([f, 2 * np.asarray(f)])), x)
    drift = jax.jit(metrics.balance_drift)(path, x)
    assert_close(drift, np.array([0.0, 3 * np.linalg.norm(imbalance(x))]))


def test_crossing_time_is_exact_for_exponentials_and_lines(x64):
    ts = np.linspace(0, 5, 13)
    assert_close(crossing_time(ts, np.exp(-ts), np.exp(-3.21)), np.array(3.21))
    assert_close(crossing_time(ts, 1 - ts, 0.0), np.array(1.0), rtol=1e-12)
    assert crossing_time(ts, np.exp(-ts), 1e-9) == np.inf
    assert crossing_time(ts, np.exp(-ts), 2.0) == 0
    late = np.where(ts > 4, np.nan, np.exp(-ts))
    assert crossing_time(ts, late, np.exp(-4.5)) == np.inf


def test_fitted_rate_ignores_what_is_outside_the_window(x64):
    ts = np.linspace(0, 4, 50)
    curve = np.where(ts < 1, 7.0, np.exp(-2.5 * ts))
    curve = np.where(ts > 3, 0.0, curve)
    assert_close(fitted_rate(ts, curve, ts > 1), np.array(2.5), rtol=1e-12)
    assert np.isnan(fitted_rate(ts, curve, ts > 3))


def quadratic(x, a):
    flat = jnp.concatenate([x["a"].ravel(), x["b"]])
    return 0.5 * flat @ a @ flat


def flat(tree):
    return np.concatenate([np.ravel(tree["a"]), tree["b"]])


def problem(values):
    """A Hessian of these eigenvalues, its eigenvectors, and where it is asked for."""
    n = len(values)
    q = np.linalg.qr(normal(0, n, n))[0]
    x = {"a": normal(1, 4, 5), "b": normal(2, 10)}
    array = lambda x: jnp.asarray(x, float)
    return array((q * values) @ q.T), q, jax.tree.map(array, x)


@pytest.mark.slow
def test_hessian_overlap_agrees_with_the_dense_hessian(x64):
    n, k = 30, 3
    values = np.concatenate([[9.0, 7.0, 5.0], np.linspace(-1, 1, n - 3)])
    a, q, x = problem(values)
    found = hessian_overlap(quadratic, x, a, k=k, key=jr.key(3), steps=25)
    g = np.asarray(a) @ flat(x)
    assert_close(found.values, values[:k], rtol=1e-9)
    assert_close(found.overlap, np.sum((q[:, :k].T @ g) ** 2) / np.sum(g**2), rtol=1e-9)
    assert found.residual < 1e-4
    rough = hessian_overlap(quadratic, x, a, k=k, key=jr.key(3), steps=4)
    assert rough.residual > found.residual  # it says when the steps were too few
    with pytest.raises(ValueError, match="k <= steps"):
        hessian_overlap(quadratic, x, a, k=5, key=jr.key(3), steps=4)


@pytest.mark.slow
def test_the_hessian_space_is_that_of_the_dense_hessian(x64):
    n, k = 30, 3
    values = np.concatenate([[9.0, 7.0, 5.0], np.linspace(-1, 1, n - 3)])
    a, q, x = problem(values)
    space = hessian_space(quadratic, x, a, k=k, key=jr.key(3), steps=25)
    g, top = flat(x), q[:, :k]
    assert_close(space.values, values[:k], rtol=1e-9)
    tx = project_out(space)  # as a basis that projects itself

    @jax.jit
    def of(x):
        own = space.project(x), space.project_out(x), space.share(x)
        return *own, tx.update(x, tx.init(x))[0]

    inside, outside, share, update = of(x)
    assert_close(flat(inside), top @ (top.T @ g), rtol=1e-7)
    assert_close(flat(outside), g - top @ (top.T @ g), rtol=1e-7)
    assert_close(share, np.sum((top.T @ g) ** 2) / np.sum(g**2), rtol=1e-7)
    assert of(jax.tree.map(jnp.zeros_like, x))[2] == 0
    assert_close(update, outside)
    assert space.residuals.shape == (k,)
    assert space.residuals[-1] < 1e-4
    # Of a Hessian with one of these directions and two others.
    turned = jnp.asarray(np.asarray(a) - 20 * top[:, 1:] @ top[:, 1:].T)
    other = hessian_space(quadratic, x, turned, k=k, key=jr.key(3), steps=30)
    overlap = jax.jit(lambda other: space.overlap(other))
    assert_close(overlap(other), np.array(1 / 3), rtol=1e-7)
    assert_close(overlap(space), np.array(1.0), rtol=1e-9)
    with pytest.raises(ValueError, match="hessian_space needs k <= steps"):
        hessian_space(quadratic, x, a, k=5, key=jr.key(3), steps=4)


def test_a_clustered_spectrum_makes_no_ghosts():
    """Four distinct eigenvalues exhaust the Krylov space long before the steps end.

    What follows is rounding, in which single precision finds the largest ones again.
    """
    n, k = 30, 3
    values = np.concatenate([[9.0, 7.0, 5.0], np.ones(n - 3)])
    a, q, x = problem(values)
    found = hessian_overlap(quadratic, x, a, k=k, key=jr.key(3), steps=n)
    g = np.asarray(a) @ flat(x)
    assert_close(found.values, values[:k].astype(np.float32), rtol=1e-5)
    want = np.sum((q[:, :k].T @ g) ** 2) / np.sum(g**2)
    assert_close(found.overlap, np.float32(want), rtol=1e-4)


def test_intruders_are_what_was_put_in(x64):
    values = jnp.linspace(8, 1, 24)
    base = with_spectrum(jr.key(0), 40, 24, values, jnp.float64)
    base = np.asarray(base)
    u, v = (x / np.linalg.norm(x, axis=0) for x in (normal(1, 40, 2), normal(2, 24, 2)))
    for count in (0, 1, 2):
        tuned = base + 100 * u[:, :count] @ v[:, :count].T
        assert intruder_dimensions(base, tuned) == count
    noise = 1e-4 * normal(3, *base.shape)
    assert intruder_dimensions(base, base + noise) == 0
    batch = intruder_dimensions(
        np.stack([base, base]), np.stack([base, base + 100 * u @ v.T])
    )
    assert batch.tolist() == [0, 2]
    with pytest.raises(ValueError, match="one shape"):
        intruder_dimensions(base, base.T)


def test_a_vector_that_was_last_before_is_no_intruder(x64):
    """Tuned vectors are looked for among all those of the base, not its leading ones."""
    base = with_spectrum(jr.key(0), 40, 24, jnp.linspace(8, 1, 24), jnp.float64)
    base = np.asarray(base)
    u, _, vt = np.linalg.svd(base, full_matrices=False)
    tuned = base + 100 * u[:, 23:24] @ vt[23:24]
    assert intruder_dimensions(base, tuned, top=5) == 0


def test_phase_times_of_a_sigmoid(x64):
    ts = np.linspace(0, 20, 400)
    loss = 1 / (1 + np.exp(2 * (ts - 10)))
    times = jax.jit(metrics.phase_times)(ts, loss, np.exp(-ts))
    assert_close(times.alignment, jnp.array(np.log(100)), rtol=1e-6)
    assert_close(times.escape, jnp.array(10 - np.log(9) / 2), rtol=1e-3)
    assert_close(times.convergence, jnp.array(10 + np.log(99) / 2), rtol=1e-3)
