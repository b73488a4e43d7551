import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import LowRank, metrics, project_out

from ..helpers import assert_close, random_low_rank, with_spectrum


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.3, np.pi / 2])
def test_misalignment_of_two_lines_at_an_angle(x64, angle):
    x = jnp.array([[1.0], [0.0], [0.0]])
    y = jnp.array([[np.cos(angle)], [np.sin(angle)], [0.0]])
    want = 2 * np.sin(angle / 2) ** 2
    assert_close(metrics.misalignment(x, y), jnp.array(want), condition=10)
    # A space that holds the other is aligned with it; the scale of the columns is free.
    assert metrics.misalignment(jnp.concatenate([x, y + 1], 1), -3 * x) < 1e-25


@pytest.mark.parametrize("factorized", [False, True])
def test_ranks_of_a_known_spectrum(x64, factorized):
    values = jnp.array([4.0, 2.0, 1.0])
    x = with_spectrum(jr.key(0), 7, 5, values, jnp.float64)
    if factorized:
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        x = LowRank(u[:, :3] * s[None, :3], vt[:3].T)
    assert_close(metrics.singular_values(x)[:3], values)
    assert_close(metrics.stable_rank(x), jnp.array(21 / 16))
    p = np.array([4, 2, 1]) / 7
    assert_close(
        metrics.effective_rank(x), jnp.array(np.exp(-np.sum(p * np.log(p)))), rtol=1e-12
    )


def test_ranks_are_free_of_scale_and_zero_at_zero():
    x = random_low_rank(jr.key(0), 6, 5, 2, batch=(3,))
    for rank in (metrics.stable_rank, metrics.effective_rank):
        assert_close(rank(LowRank(1e-18 * x.left, 1e-18 * x.right)), rank(x), condition=100)
        assert_close(rank(x), jnp.stack([rank(m) for m in x.materialize()]), rtol=1e-3)
        assert rank(jnp.zeros((3, 2))) == 0


def test_balance_is_zero_after_balancing_and_drift_knows_batches(x64):
    import lrjax

    x = random_low_rank(jr.key(0), 6, 5, 2, dtype=jnp.float64)
    assert jnp.max(jnp.abs(metrics.imbalance(lrjax.balance(x)))) < 1e-12
    path = jax.tree.map(lambda f: jnp.stack([f, 2 * f]), x)
    drift = metrics.balance_drift(path, x)
    want = 3 * jnp.linalg.norm(metrics.imbalance(x))
    assert_close(drift, jnp.array([0.0, want]))


def test_crossing_time_is_exact_for_exponentials_and_lines(x64):
    ts = jnp.linspace(0, 5, 13)
    assert_close(metrics.crossing_time(ts, jnp.exp(-ts), np.exp(-3.21)), jnp.array(3.21))
    assert_close(metrics.crossing_time(ts, 1 - ts, 0.0), jnp.array(1.0), rtol=1e-12)
    assert metrics.crossing_time(ts, jnp.exp(-ts), 1e-9) == jnp.inf
    assert metrics.crossing_time(ts, jnp.exp(-ts), 2.0) == 0
    late = jnp.where(ts > 4, jnp.nan, jnp.exp(-ts))
    assert metrics.crossing_time(ts, late, np.exp(-4.5)) == jnp.inf


def test_fitted_rate_ignores_what_is_outside_the_window(x64):
    ts = jnp.linspace(0, 4, 50)
    curve = jnp.where(ts < 1, 7.0, jnp.exp(-2.5 * ts))
    curve = jnp.where(ts > 3, 0.0, curve)
    assert_close(metrics.fitted_rate(ts, curve, ts > 1), jnp.array(2.5), rtol=1e-12)
    assert jnp.isnan(metrics.fitted_rate(ts, curve, ts > 3))


def quadratic(x, a):
    flat = jnp.concatenate([x["a"].ravel(), x["b"]])
    return 0.5 * flat @ a @ flat


def test_hessian_overlap_agrees_with_the_dense_hessian(x64):
    n, k = 30, 3
    values = jnp.concatenate([jnp.array([9.0, 7.0, 5.0]), jnp.linspace(-1, 1, n - 3)])
    q = jnp.linalg.qr(jr.normal(jr.key(0), (n, n)))[0]
    a = (q * values[None]) @ q.T
    x = {"a": jr.normal(jr.key(1), (4, 5)), "b": jr.normal(jr.key(2), (10,))}
    found = metrics.hessian_overlap(quadratic, x, a, k=k, key=jr.key(3), steps=25)
    g = a @ jnp.concatenate([x["a"].ravel(), x["b"]])
    assert_close(found.values, values[:k], rtol=1e-9)
    assert_close(found.overlap, jnp.sum((q[:, :k].T @ g) ** 2) / jnp.sum(g**2), rtol=1e-9)
    assert found.residual < 1e-4
    rough = metrics.hessian_overlap(quadratic, x, a, k=k, key=jr.key(3), steps=4)
    assert rough.residual > found.residual  # it says when the steps were too few
    with pytest.raises(ValueError, match="k <= steps"):
        metrics.hessian_overlap(quadratic, x, a, k=5, key=jr.key(3), steps=4)


def test_the_hessian_space_is_that_of_the_dense_hessian(x64):
    n, k = 30, 3
    values = jnp.concatenate([jnp.array([9.0, 7.0, 5.0]), jnp.linspace(-1, 1, n - 3)])
    q = jnp.linalg.qr(jr.normal(jr.key(0), (n, n)))[0]
    a = (q * values[None]) @ q.T
    x = {"a": jr.normal(jr.key(1), (4, 5)), "b": jr.normal(jr.key(2), (10,))}
    space = metrics.hessian_space(quadratic, x, a, k=k, key=jr.key(3), steps=25)
    flat = lambda tree: jnp.concatenate([tree["a"].ravel(), tree["b"]])
    g, top = flat(x), q[:, :k]
    assert_close(space.values, values[:k], rtol=1e-9)
    assert_close(flat(space.project(x)), top @ (top.T @ g), rtol=1e-7)
    assert_close(flat(space.project_out(x)), g - top @ (top.T @ g), rtol=1e-7)
    assert_close(space.share(x), jnp.sum((top.T @ g) ** 2) / jnp.sum(g**2), rtol=1e-7)
    assert space.share(jax.tree.map(jnp.zeros_like, x)) == 0
    tx = project_out(space)  # as a basis that projects itself
    assert_close(tx.update(x, tx.init(x))[0], space.project_out(x))
    assert space.residuals.shape == (k,)
    assert space.residuals[-1] < 1e-4
    # Of a Hessian with one of these directions and two others.
    turned = a - 20 * top[:, 1:] @ top[:, 1:].T
    other = metrics.hessian_space(quadratic, x, turned, k=k, key=jr.key(3), steps=30)
    assert_close(space.overlap(other), jnp.array(1 / 3), rtol=1e-7)
    assert_close(space.overlap(space), jnp.array(1.0), rtol=1e-9)
    with pytest.raises(ValueError, match="hessian_space needs k <= steps"):
        metrics.hessian_space(quadratic, x, a, k=5, key=jr.key(3), steps=4)


def test_a_clustered_spectrum_makes_no_ghosts():
    """Four distinct eigenvalues exhaust the Krylov space long before the steps end.

    What follows is rounding, in which single precision finds the largest ones again.
    """
    n, k = 30, 3
    values = jnp.concatenate([jnp.array([9.0, 7.0, 5.0]), jnp.ones(n - 3)])
    q = jnp.linalg.qr(jr.normal(jr.key(0), (n, n)))[0]
    a = (q * values[None]) @ q.T
    x = {"a": jr.normal(jr.key(1), (4, 5)), "b": jr.normal(jr.key(2), (10,))}
    found = metrics.hessian_overlap(quadratic, x, a, k=k, key=jr.key(3), steps=n)
    g = a @ jnp.concatenate([x["a"].ravel(), x["b"]])
    assert_close(found.values, values[:k], rtol=1e-5)
    assert_close(found.overlap, jnp.sum((q[:, :k].T @ g) ** 2) / jnp.sum(g**2), rtol=1e-4)


def test_intruders_are_what_was_put_in(x64):
    values = jnp.linspace(8, 1, 24)
    base = with_spectrum(jr.key(0), 40, 24, values, jnp.float64)
    u = jr.normal(jr.key(1), (40, 2))
    v = jr.normal(jr.key(2), (24, 2))
    u, v = u / jnp.linalg.norm(u, axis=0)[None], v / jnp.linalg.norm(v, axis=0)[None]
    for count in (0, 1, 2):
        tuned = base + 100 * u[:, :count] @ v[:, :count].T
        assert metrics.intruder_dimensions(base, tuned) == count
    noise = 1e-4 * jr.normal(jr.key(3), base.shape)
    assert metrics.intruder_dimensions(base, base + noise) == 0
    batch = metrics.intruder_dimensions(
        jnp.stack([base, base]), jnp.stack([base, base + 100 * u @ v.T])
    )
    assert batch.tolist() == [0, 2]
    with pytest.raises(ValueError, match="one shape"):
        metrics.intruder_dimensions(base, base.T)


def test_a_vector_that_was_last_before_is_no_intruder(x64):
    """Tuned vectors are looked for among all those of the base, not its leading ones."""
    base = with_spectrum(jr.key(0), 40, 24, jnp.linspace(8, 1, 24), jnp.float64)
    u, _, vt = jnp.linalg.svd(base, full_matrices=False)
    tuned = base + 100 * u[:, 23:24] @ vt[23:24]
    assert metrics.intruder_dimensions(base, tuned, top=5) == 0


def test_phase_times_of_a_sigmoid(x64):
    ts = jnp.linspace(0, 20, 400)
    loss = 1 / (1 + jnp.exp(2 * (ts - 10)))
    times = metrics.phase_times(ts, loss, jnp.exp(-ts))
    assert_close(times.alignment, jnp.array(np.log(100)), rtol=1e-6)
    assert_close(times.escape, jnp.array(10 - np.log(9) / 2), rtol=1e-3)
    assert_close(times.convergence, jnp.array(10 + np.log(99) / 2), rtol=1e-3)
