"""Statistics of subspaces beside closed forms and dense references."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import linalg
from tests.helpers import assert_close


KEY = jr.key(3)
AVERAGES = (linalg.subspace_mean, linalg.subspace_median)
averages = pytest.mark.parametrize("average", AVERAGES)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def orthonormal(key, p, n, k, spread=None):
    """Random bases ``(p, n, k)``, or those near one of them."""
    x = jr.normal(key, (p, n, k))
    if spread is not None:
        x = linalg.orthonormalize(x[:1]) + spread * x
    return linalg.orthonormalize(x)


@functools.partial(jax.jit, static_argnames=("average", "blocks", "max_steps"))
def averaged(average, x, weights=None, blocks=None, max_steps=2000):
    return average(x, weights, blocks=blocks, max_steps=max_steps)


difference = jax.jit(linalg.subspace_difference)
angles_of = jax.jit(linalg.principal_angles)
overlap = jax.jit(linalg.subspace_overlap)
geodesic = jax.jit(lambda x, direction, t: linalg.geodesic(x, t * direction))


def ends(blocks):
    return [slice(sum(blocks[:i]), sum(blocks[: i + 1])) for i in range(len(blocks))]


def distances(x, y, blocks):
    """``√Σ_i (w_i − ‖X_iᵀ Y_i‖²)`` in NumPy."""
    held = [np.sum((x[:, :, c].mT @ y[None, :, c]) ** 2, axis=(1, 2)) for c in ends(blocks)]
    return np.sqrt(sum(blocks) - sum(held))


def dense_gradient(x, y, weights, blocks):
    """The Riemannian gradient of ``Σ a_j d²`` on the flag manifold, by n × n projectors.

    ``Y_i' Y_kᵀ`` moves of one block against another or against the complement: with
    ``Q = [Y, Y_⊥]`` the derivative along the rotation of columns i and l of Q.
    """
    n, k = y.shape
    q = np.linalg.svd(y)[0]
    q = np.concatenate([y, q[:, k:]], axis=1)
    cuts = ends(blocks)
    projectors = [np.einsum("p,pnk,pmk->nm", weights, x[:, :, c], x[:, :, c]) for c in cuts]
    projectors.append(np.zeros((n, n)))  # of the complement
    cuts = [*cuts, slice(k, n)]
    worst = 0.0
    for i, a in enumerate(cuts):
        for j, b in enumerate(cuts):
            if i < j:
                turn = q[:, a].T @ (projectors[i] - projectors[j]) @ q[:, b]
                worst = max(worst, np.abs(turn).max())
    return worst / np.abs(projectors[0]).max()


def test_a_mean_of_one_block_is_that_of_leading_eigenvectors(x64):
    x = np.asarray(orthonormal(KEY, 6, 12, 3))
    weights = np.linspace(1, 2, 6)
    found = averaged(linalg.subspace_mean, x, weights)
    values, vectors = np.linalg.eigh(np.einsum("p,pnk,pmk->nm", weights, x, x))
    top = vectors[:, ::-1][:, :3]
    basis = np.asarray(found.basis)
    np.testing.assert_allclose(np.abs(np.sum(basis * top, axis=0)), 1, rtol=1e-12)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        found.agreement, values[::-1][:3] / weights.sum(), rtol=1e-12
    )
    np.testing.assert_allclose(
        found.cost, 3 * weights.sum() - values[::-1][:3].sum(), rtol=1e-12
    )
    assert found.converged
    assert found.steps == 0  # the start is the solution already


@pytest.mark.slow
@pytest.mark.parametrize("n", [9, 40])  # with and without more rows than columns together
def test_at_the_mean_of_flags_the_dense_gradient_is_zero(n, x64):
    blocks, weights = (1, 2, 1), np.array([1.0, 2.0, 0.5, 1.5])
    x = np.asarray(orthonormal(KEY, 4, n, 4, 0.3))
    found = averaged(linalg.subspace_mean, x, weights, blocks)
    y = np.asarray(found.basis)
    assert found.converged
    assert dense_gradient(x, y, weights, blocks) < 1e-12
    other = np.asarray(orthonormal(jr.key(9), 1, n, 4, 0.3))[0]
    assert dense_gradient(x, other, weights, blocks) > 0.1  # it is not always zero
    np.testing.assert_allclose(found.distances, distances(x, y, blocks), rtol=1e-10)
    np.testing.assert_allclose(
        found.cost, weights @ distances(x, y, blocks) ** 2, rtol=1e-10
    )


@pytest.mark.slow
def test_at_the_median_the_weighed_gradient_is_zero(x64):
    blocks = (1, 2)
    x = np.asarray(orthonormal(KEY, 5, 9, 3, 0.3))
    found = averaged(linalg.subspace_median, x, None, blocks)
    assert found.converged
    away = distances(x, np.asarray(found.basis), blocks)
    assert dense_gradient(x, np.asarray(found.basis), 1 / away, blocks) < 1e-12
    np.testing.assert_allclose(found.cost, away.sum(), rtol=1e-12)


@pytest.mark.slow
@averages
def test_no_step_raises_the_cost(average, x64):
    x = orthonormal(KEY, 6, 12, 4)
    start = lambda steps: average(x, blocks=(1, 1, 2), max_steps=steps)
    found = jax.jit(jax.vmap(start))(jnp.arange(40))
    costs = np.asarray(found.cost)
    assert np.all(np.diff(costs) <= 1e-12 * costs[0])
    assert costs[-1] < costs[0] - 1e-3
    assert not found.converged[1]  # and it says that it is not there yet
    np.testing.assert_array_equal(found.steps, np.arange(40))


@pytest.mark.slow
@averages
def test_an_average_knows_of_subspaces_alone_not_of_bases(average, x64):
    """Columns of any scale, dependent on those before: of flags within the blocks."""
    x = np.asarray(orthonormal(KEY, 5, 11, 3, 0.3))
    full = np.random.default_rng(0).standard_normal((5, 3, 3))
    upper = np.where(np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1]]), full, 0)
    for blocks, turn in (((1, 2), upper), ((3,), full)):
        found, turned = (
            jax.device_get(averaged(average, y, None, blocks)) for y in (x, x @ turn)
        )
        assert_close(turned.cost, found.cost, rtol=1e-9)
        for c in ends(blocks):
            y, z = found.basis[:, c], turned.basis[:, c]
            assert_close(z @ z.T, y @ y.T, rtol=1e-9)


@pytest.mark.slow
@averages
def test_averages_turn_with_the_space_and_ignore_what_no_subspace_sees(average, x64):
    x = np.asarray(orthonormal(KEY, 5, 9, 3, 0.3))
    q = np.asarray(orthonormal(jr.key(8), 1, 30, 9))[
        0
    ]  # into a larger space: the reduced coordinates
    found, moved = (jax.device_get(averaged(average, y, None, (1, 2))) for y in (x, q @ x))
    assert_close(moved.distances, found.distances, rtol=1e-9)
    np.testing.assert_allclose(
        np.abs(moved.basis.T @ (q @ found.basis)), np.eye(3), atol=1e-8
    )


@pytest.mark.slow
def test_less_than_half_cannot_move_the_median(x64):
    centre = np.asarray(orthonormal(KEY, 7, 15, 3, 0.05))
    wild = np.asarray(orthonormal(jr.key(7), 5, 15, 3))
    x = np.concatenate([centre, wild])
    truth = averaged(linalg.subspace_mean, centre).basis
    off = [float(angles_of(averaged(average, x).basis, truth)[-1]) for average in AVERAGES]
    assert off[1] < 0.6 * off[0]
    same = np.concatenate([np.stack([truth] * 7), wild])
    found = averaged(linalg.subspace_median, same)
    assert float(angles_of(found.basis, truth)[-1]) < 1e-5  # LEAST
    assert found.converged


@pytest.mark.slow
@averages
def test_one_subspace_is_its_own_average(average):
    x = orthonormal(KEY, 1, 6, 2)
    found = averaged(average, jnp.concatenate([x, x]), None, (1, 1))
    assert found.converged
    assert float(found.distances.max()) < 1e-5
    assert jnp.isfinite(found.cost)


def test_a_number_that_is_none_has_not_converged():
    x = orthonormal(KEY, 3, 6, 2).at[0, 0, 0].set(jnp.nan)
    assert not averaged(linalg.subspace_mean, x).converged


@pytest.mark.slow
def test_sum_of_projectors_has_the_eigenvalues_of_a_difference(x64):
    x, y = np.asarray(orthonormal(KEY, 2, 10, 3))
    found = difference(x, y)
    values, vectors = np.linalg.eigh(x @ x.T + y @ y.T)
    angles = np.asarray(found.angles)
    np.testing.assert_allclose(values[-4:-7:-1], 1 - np.cos(angles), rtol=1e-12)
    np.testing.assert_allclose(values[-3:], 1 + np.cos(angles), rtol=1e-12)
    np.testing.assert_allclose(
        np.abs(np.sum(vectors[:, -4:-7:-1] * found.directions, axis=0)), 1, rtol=1e-12
    )
    np.testing.assert_allclose(
        np.abs(np.sum(vectors[:, -3:] * found.middle, axis=0)), 1, rtol=1e-12
    )
    np.testing.assert_allclose(
        found.magnitude, np.sum(2 * (1 - np.cos(angles))), rtol=1e-12
    )
    np.testing.assert_allclose(angles[::-1], angles_of(x, y), rtol=1e-12)


@pytest.mark.slow
def test_the_middle_is_halfway_on_the_geodesic_and_the_mean(x64):
    x, direction = orthonormal(KEY, 2, 10, 3)
    end, half = (geodesic(x, direction, t) for t in (0.5, 0.25))
    found = difference(x, end)
    assert float(angles_of(found.middle, half)[-1]) < 1e-12
    mean = averaged(linalg.subspace_mean, jnp.stack([x, end]))
    assert float(angles_of(found.middle, mean.basis)[-1]) < 1e-12


@jax.jit
def bend(x, direction, at):
    return linalg.subspace_acceleration(x, *(geodesic(x, direction, t) for t in (at, 2.0)))


def test_a_geodesic_has_no_second_difference(x64):
    x, direction = orthonormal(KEY, 2, 10, 3)
    direction = 0.3 * direction
    found = bend(x, direction, 1.0)
    assert float(found.angles.max()) < 1e-14
    np.testing.assert_array_equal(found.directions, 0)
    assert float(bend(x, direction, 1.2).angles.max()) > 0.01


def test_small_angles_are_not_lost_to_rounding():
    """In float32 ``1 − cos θ`` is zero below 2·10⁻⁴."""
    both = orthonormal(KEY, 1, 10, 6)[0]
    x, away, angles = both[:, :3], both[:, 3:], jnp.array([1e-4, 3e-5, 1e-5])
    found = difference(x, geodesic(x, away, angles[None]))
    assert_close(found.angles, angles, rtol=0.2)


@pytest.mark.parametrize("other", [0, 1])
def test_equal_and_orthogonal_subspaces_have_finite_differences(other):
    eye = jnp.eye(6)
    found = difference(eye[:, :2], eye[:, 2 * other : 2 * other + 2])
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    np.testing.assert_allclose(found.angles, other * np.pi / 2, atol=1e-6)
    np.testing.assert_allclose(found.magnitude, other * 4, atol=1e-6)


def test_overlap_is_the_mean_squared_cosine(x64):
    both = np.asarray(orthonormal(KEY, 2, 10, 3))
    x, y = both[0], both[1, :, :2]
    wanted = np.mean(np.cos(angles_of(x, y)) ** 2)
    turn = np.array([[1.0, 2.0], [-3.0, 1.0]])
    np.testing.assert_allclose(overlap(x, y @ turn), wanted, rtol=1e-10)
    np.testing.assert_allclose(overlap(x, x[:, 1:] * 9), 1, rtol=1e-10)


def test_the_error_bar_is_what_samples_do(x64):
    """2,000 draws by NumPy: a spread of 2 %, and half a percent of second order."""
    values, rank, samples = np.array([9.0, 6.0, 1.0, 0.5, 0.1]), 2, 400
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, samples, 5)) * np.sqrt(values)
    top = np.linalg.eigh(x.mT @ x)[1][:, :, -rank:]
    squares = 2 * (rank - np.sum(top[:, :rank] ** 2, axis=(1, 2)))
    found = linalg.subspace_error(jnp.asarray(values), rank, samples)
    spread = squares.std() / 2000**0.5 / squares.mean()
    assert abs(found.square / squares.mean() - 1) < 4 * spread + 0.01
    assert found.trusted
    np.testing.assert_allclose(found.angle, np.sqrt(found.square / 4), rtol=1e-12)


def test_the_error_bar_says_when_it_is_none():
    values = jnp.array([2.0, 1.0, 1.0, 0.0])
    few, closed = (linalg.subspace_error(values, *given) for given in ((1, 10), (2, 10**6)))
    assert not few.trusted
    assert not closed.trusted
    assert jnp.isinf(closed.square)
    exact = linalg.subspace_error(jnp.array([2.0, 1.0, 0.0, 0.0]), 2, 5)
    assert exact.square == 0  # nothing outside that could turn it
    assert exact.trusted
    heavy = linalg.subspace_error(values, 1, 1000, kurtosis=6.0)
    assert_close(heavy.square, 2 * linalg.subspace_error(values, 1, 1000).square)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: linalg.subspace_mean(x, blocks=(1, 1)), "add up to the 3 columns"),
        (lambda x: linalg.subspace_median(x, blocks=(4, -1)), "at least one column"),
        (lambda x: linalg.subspace_mean(x, jnp.ones(3)), "each of 2 subspaces"),
        (lambda x: linalg.subspace_mean(x[:0]), "at least one subspace"),
        (lambda x: linalg.subspace_mean(x.mT), "1 <= k <= n"),
        (lambda x: linalg.subspace_difference(x[0], x[0, :, :2]), "bases of one shape"),
        (lambda x: linalg.subspace_overlap(x[0], x[0, 1:]), "two subspaces of one space"),
        (lambda x: linalg.subspace_error(x[0, 0], 3, 10), "between 1 and 2"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(jnp.ones((2, 5, 3)))
