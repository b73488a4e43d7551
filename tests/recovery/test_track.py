import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.recovery import SubspaceTracker


N, RANK, ROWS, FIRST = 40, 2, 160, 40
SPEED = 0.006  # radians a row


def moving(key):
    """Rows from a plane that turns steadily into other directions."""
    k_basis, k_rows = jr.split(key)
    q = jnp.linalg.qr(jr.normal(k_basis, (N, 2 * RANK)))[0]
    angle = SPEED * jnp.arange(ROWS)[:, None, None]
    bases = jnp.cos(angle) * q[None, :, :RANK] + jnp.sin(angle) * q[None, :, RANK:]
    return jnp.einsum("tnr,tr->tn", bases, jr.normal(k_rows, (ROWS, RANK))), q[:, :RANK]


def corrupted(key, x):
    where, size, seen = jr.split(key, 3)
    errors = jnp.max(jnp.abs(x)) * jr.uniform(size, x.shape, minval=-5, maxval=5)
    y = jnp.where(jr.bernoulli(where, 0.1, x.shape), x + errors, x)
    return jnp.where(jr.bernoulli(seen, 0.8, x.shape), y, jnp.nan)


def start(basis, forget=0.9):
    return SubspaceTracker(basis, jnp.full(RANK, 3.0), jnp.asarray(forget))


track = jax.jit(lambda tracker, rows: tracker.track(rows))


def errors(parts, x):
    size = jnp.maximum(jnp.linalg.norm(x, axis=1), 1e-3)
    return jnp.linalg.norm(parts.clean - x, axis=1) / size


def test_follows_a_plane_that_turns_by_a_radian(getkey):
    x, basis = moving(getkey())
    _, parts = track(start(basis), corrupted(getkey(), x))
    late = errors(parts, x)[ROWS // 2 :]
    _, still = track(start(basis, 1.0), corrupted(getkey(), x))
    # It lags by some rows; what forgets nothing stays at the mean of all planes.
    behind = errors(still, x)[ROWS // 2 :]
    assert float(jnp.median(late)) < 0.8 * float(jnp.median(behind))


@pytest.mark.slow
def test_a_plane_that_stays_is_kept_and_errors_are_found(getkey):
    x, basis = moving(getkey())
    x = x[:60] @ basis @ basis.T
    y = corrupted(getkey(), x)
    tracker, parts = track(start(basis), y)
    assert float(jnp.median(errors(parts, x))) < 1e-3
    want = jnp.where(jnp.isfinite(y), y - x, 0)
    wrong = jnp.abs(want) > 1e-2 * jnp.max(jnp.abs(x))
    assert float(jnp.mean((parts.sparse != 0)[wrong])) > 0.95
    overlap = jnp.linalg.norm(tracker.basis.T @ basis) ** 2 / RANK
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


@pytest.mark.slow
def test_without_errors_it_is_the_incremental_svd(getkey):
    """A rank as wide as the data, nothing forgotten: the SVD of all rows."""
    rows = jr.normal(getkey(), (12, RANK)) @ jr.normal(getkey(), (RANK, N))
    _, values, right = jnp.linalg.svd(rows[:4], full_matrices=False)
    tracker = SubspaceTracker(right[:RANK].T, values[:RANK], jnp.asarray(1.0))
    end, _ = tracker.track(rows[4:], batch=4)
    want = jnp.linalg.svd(rows, compute_uv=False)[:RANK]
    np.testing.assert_allclose(end.values, want, rtol=1e-4)


@pytest.mark.slow
def test_starts_from_a_fit_and_refuses_other_rows():
    problem = lrjax.robust_pca(jr.key(0), (60, N), RANK, 0.05)
    fit = lrjax.fit_robust_pca(problem.targets)
    tracker = SubspaceTracker.from_fit(fit)
    assert tracker.basis.shape == (N, RANK)
    with pytest.raises(ValueError, match=r"\(k, 40\)"):
        tracker.update(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="divide the 5 rows"):
        tracker.track(jnp.ones((5, N)), batch=2)
