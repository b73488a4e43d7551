import itertools

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from scipy.linalg import fractional_matrix_power

import lrjax
from lrjax import LowRank, flows, gradient_flow

from ..helpers import assert_close, random_low_rank
from ..reference.flows import balanced_flow
from .conftest import approximation


def derivative(f, t):
    return jax.jit(lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1])(t)


@pytest.mark.slow_but("2.5")
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_aligned_modes_solve_their_equation(scale):
    b0 = jnp.array([0.0, 0.3, -0.2, 0.1, 1e-6, 0.5, 0.0])
    a0 = jnp.array([0.5, 0.3, 0.2, 0.0, 1e-6, -3.0, 0.0])
    sigma = jnp.array([3.0, 2.0, 1.0, 1e-3, 1.0, 0.0, 2.0])
    modes = jax.jit(lambda t: flows.aligned_modes(t, b0, a0, sigma, scale))
    start = modes(jnp.array(0.0))
    assert_close(start, (b0, a0))
    for t in jnp.array([0.1, 1.0, 5.0, 200.0]):
        b, a = modes(t)
        db, da = derivative(modes, t)
        speed = scale * (sigma - scale * a * b)
        size = 1 + jnp.max(jnp.abs(db))
        assert jnp.max(jnp.abs(db - speed * a)) <= 1e-13 * size
        assert jnp.max(jnp.abs(da - speed * b)) <= 1e-13 * size
        assert jnp.max(jnp.abs(b**2 - a**2 - b0**2 + a0**2)) <= 1e-13 * 10


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1e-3, 1e-8, 1e-10, 1e-20, 1e-30])
def test_aligned_modes_in_float32_leave_any_start(alpha):
    sigma = jnp.array([1.0, 0.5], jnp.float32)
    t = jnp.array([2.0, 30.0, 90.0, 500.0])
    exact = flows.aligned_modes(t, *(jnp.full(2, alpha),) * 2, sigma.astype(float))
    start = jnp.full(2, alpha, jnp.float32)
    got = flows.aligned_modes(t.astype(jnp.float32), start, start, sigma)
    assert got[0].dtype == jnp.float32
    # A relative error of the rate is one of t times that in the exponent.
    for g, e in zip(got, exact, strict=True):
        assert jnp.max(jnp.abs(g / e - 1)) <= 100 * jnp.finfo(jnp.float32).eps
    assert_close(got[0][3] * got[1][3], sigma, condition=10)


@pytest.mark.slow
def test_a_small_factor_beside_a_large_one_keeps_its_digits():
    b0, a0 = jnp.array([1.0, -2.0]), jnp.array([1e-9, 1e-7])
    sigma, t = jnp.array([1e-9, 3e-8]), jnp.array([0.1, 1.0, 20.0])
    exact = flows.aligned_modes(t, b0, a0, sigma)
    narrow = (x.astype(jnp.float32) for x in (t, b0, a0, sigma))
    for got, want in zip(flows.aligned_modes(*narrow), exact, strict=True):
        assert jnp.max(jnp.abs(got / want - 1)) <= 100 * jnp.finfo(jnp.float32).eps


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.0, 1.0, 500.0])
def test_derivatives_of_aligned_modes_are_finite_everywhere(t):
    b0, a0 = jnp.array([0.0, 1.0, 1.0, 0.0, 0.5]), jnp.array([0.0, -1.0, 1.0, 0.3, 2.0])
    sigma = jnp.array(
        [1.0, 1.0, 1.0, 0.0, 1.0]
    )  # the last two do not move, or have arrived

    def ends(t, b, a, sigma):
        return flows.aligned_modes(t, b, a, sigma)

    for row in jax.tree.leaves(jax.jacrev(ends, (0, 1, 2, 3))(jnp.array(t), b0, a0, sigma)):
        assert jnp.all(jnp.isfinite(row))


@pytest.mark.slow
def test_aligned_modes_approach_at_the_rate_of_their_imbalance():
    b0, a0, sigma = jnp.array([0.1]), jnp.array([1.5]), jnp.array([1.0])
    t = jnp.array([3.0, 4.0])
    b, a = flows.aligned_modes(t, b0, a0, sigma)
    gap = sigma[None] - b * a
    rate = jnp.log(gap[0] / gap[1])
    assert_close(rate, jnp.sqrt(4 * sigma**2 + (b0**2 - a0**2) ** 2), rtol=1e-3)


@pytest.mark.slow
def test_balanced_aligned_modes_are_the_riccati_solution(aligned):
    alpha = 0.1 * jnp.ones(3)
    start = LowRank(aligned.u * alpha[None], aligned.v * alpha[None])
    for t in jnp.array([0.0, 0.7, 2.0]):
        b, a = flows.aligned_modes(t, alpha, alpha, aligned.sigma)
        product = flows.riccati(t, start, aligned.target).product
        assert_close(product, aligned.matrix(b * a), condition=1e4)


@pytest.mark.slow
def test_the_riccati_solution_satisfies_its_equation():
    target = jr.normal(jr.key(0), (4, 3)) / 2
    start = lrjax.balance(
        LowRank(jr.normal(jr.key(1), (4, 2)), jr.normal(jr.key(2), (3, 2)))
    )
    blocks = jax.jit(lambda t: flows.riccati(t, start, target))
    t = jnp.array(0.8)
    x, ll, rr = blocks(t)
    dx, dl, dr = derivative(blocks, t)
    e = target - x
    assert_close(dx, e @ rr + ll @ e, condition=1e4)
    assert_close(dl, e @ x.T + x @ e.T, condition=1e4)
    assert_close(dr, e.T @ x + x.T @ e, condition=1e4)


def trace_loss(x, base):
    return 0.5 * (jnp.trace(base) + jnp.sum(x.left * x.right)) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_trace_squared(symmetric):
    n, r = 6, 2
    base = jr.normal(jr.key(0), (n, n)) + (-2 if symmetric else 2) * jnp.eye(n)
    left, right = (0.5 * jr.normal(jr.key(k), (n, r)) for k in (1, 2))
    start = LowRank(left, left if symmetric else right)  # symmetric: q = 0
    solution = gradient_flow(
        trace_loss, start, base, t1=1.0, ts=jnp.array([0.05, 0.3, 1.0]), rtol=1e-12
    )
    for k, t in enumerate((0.05, 0.3, 1.0)):
        exact = jax.jit(flows.trace_squared)(jnp.array(t), start, base)
        got = jax.tree.map(lambda x: x[k], solution.params)  # noqa: B023
        assert_close(got, exact, rtol=1e-9)
    end = solution.params
    isotropic = end.left @ end.left.mT - end.right @ end.right.mT
    before = start.left @ start.left.T - start.right @ start.right.T
    assert jnp.max(jnp.abs(isotropic - before[None])) <= 1e-9


@pytest.mark.slow
def test_trace_squared_ends_as_far_from_the_full_solution_as_its_rank_says():
    n = 12
    base = jnp.eye(n) + 0.1 * jr.normal(jr.key(0), (n, n))
    full = -jnp.trace(base) / n * jnp.eye(n)
    for r in (1, 3, 12):
        rows = jnp.linalg.qr(jr.normal(jr.key(r), (n, n)))[0][:, :r]
        start = LowRank(jnp.zeros((n, r)), rows)
        end = flows.trace_squared(jnp.array(1e3), start, base).materialize()
        assert_close(end, -jnp.trace(base) / r * rows @ rows.T, rtol=1e-9)
        distance = jnp.linalg.norm(end - full) / jnp.linalg.norm(full)
        assert jnp.abs(distance - jnp.sqrt(n / r - 1)) <= 1e-7


@pytest.mark.slow
def test_half_learning_times_are_where_the_modes_are_half():
    sigma, alpha = jnp.array([3.0, 2.0, 0.5]), 1e-3
    times = flows.half_learning_times(sigma, alpha)
    same = jnp.full(3, alpha)
    b, a = flows.aligned_modes(times, same, same, sigma)
    assert_close(jnp.diagonal(b * a), sigma / 2, condition=100)


@pytest.mark.slow_but("1")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_end_to_end_velocity(depth):
    weight, gradient = jr.normal(jr.key(0), (4, 3)), jr.normal(jr.key(1), (4, 3))
    want = jnp.zeros((4, 3))
    for j in range(1, depth + 1):
        left = fractional_matrix_power(weight @ weight.T, (depth - j) / depth)
        right = fractional_matrix_power(weight.T @ weight, (j - 1) / depth)
        if j == depth:
            left = jnp.eye(4)
        want = want - left.real @ gradient @ right.real
    got = flows.end_to_end_velocity(weight, gradient, depth)
    # The reference takes roots of a singular matrix: half of the digits.
    assert_close(got, want, rtol=1e-5 if depth > 1 else 1e-12)


@pytest.mark.slow
def test_directions_that_a_deep_product_lacks_do_not_move_it(getkey):
    """A singular value of rounding error would have a root of 4e-2 at depth ten."""
    x = random_low_rank(getkey(), 6, 5, 2, dtype=jnp.float64)
    weight, gradient = x.materialize(), jr.normal(getkey(), (6, 5))
    (u, _), (v, _) = (jnp.linalg.qr(side) for side in (x.left, x.right))
    velocity = flows.end_to_end_velocity(weight, gradient, 10)
    beside = velocity - u @ (u.T @ velocity)
    assert jnp.max(jnp.abs(beside - beside @ v @ v.T)) <= 1e-12 * jnp.max(jnp.abs(velocity))


def deep_loss(weights, target):
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    return 0.5 * jnp.sum((target - product) ** 2)


@pytest.mark.slow
def test_deep_linear_network_follows_its_end_to_end_flow():
    depth = 3
    u, _, vt = jnp.linalg.svd(jr.normal(jr.key(0), (4, 4)))
    rotations = [vt.T, *(jnp.linalg.qr(jr.normal(jr.key(k), (4, 4)))[0] for k in (1, 2)), u]
    root = jnp.diag(jnp.array([1.0, 0.8, 0.5, 0.4]))
    weights = [rotations[j + 1] @ root @ rotations[j].T for j in range(depth)]
    target = jr.normal(jr.key(3), (4, 4))
    end = gradient_flow(deep_loss, weights, target, t1=0.5, rtol=1e-11, atol=1e-12).params
    product = end[2] @ end[1] @ end[0]
    for lower, upper in itertools.pairwise(end):  # balance of neighbours
        assert jnp.max(jnp.abs(upper.T @ upper - lower @ lower.T)) <= 1e-9

    def velocity(t, w, target):
        del t
        return flows.end_to_end_velocity(w, w - target, depth)

    start = weights[2] @ weights[1] @ weights[0]
    direct = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        t0=0.0,
        t1=0.5,
        dt0=None,
        y0=start,
        args=target,
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-12),
    )
    assert_close(product, direct.ys[0], rtol=1e-9)


@pytest.mark.slow
def test_balance_moves_by_the_square_of_the_step_exactly():
    # Numbers of size one, so that rounding stays below the bound of 1e-14.
    x = LowRank(0.4 * jr.normal(jr.key(0), (5, 2)), 0.4 * jr.normal(jr.key(1), (4, 2)))
    target, eta = jr.normal(jr.key(2), (5, 4)), 0.03
    g = jax.grad(approximation)(x, target)
    moved = jax.tree.map(lambda p, d: p - eta * d, x, g)
    drift = lrjax.metrics.imbalance(moved) - lrjax.metrics.imbalance(x)
    dense = x.materialize() - target
    want = x.right.T @ dense.T @ dense @ x.right - x.left.T @ dense @ dense.T @ x.left
    assert_close(drift, eta**2 * want, condition=1e4)
    assert jnp.max(jnp.abs(drift - eta**2 * want)) <= 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("reach", [2, 20, 60, 200])  # 2 σ₁ t
def test_riccati_has_its_digits_at_any_time(reach, getkey):
    u, v = (jnp.linalg.qr(jr.normal(getkey(), (n, n)))[0] for n in (5, 4))
    sigma = jnp.array([1.0, 0.7, 0.4, 0.1])
    target = u[:, :4] @ jnp.diag(sigma) @ v.T
    start = lrjax.balance(random_low_rank(getkey(), 5, 4, 3, dtype=jnp.float64))
    start = jax.tree.map(lambda x: 0.1 * x, start)
    want = balanced_flow(reach / 2, start.left, start.right, u, sigma, v)
    blocks = flows.riccati(jnp.array(reach / 2), start, target)
    got = jnp.block(
        [[blocks.left_gram, blocks.product], [blocks.product.T, blocks.right_gram]]
    )
    assert jnp.max(jnp.abs(got - want)) <= 1e-13


@pytest.mark.slow
def test_the_riccati_solution_differentiates_by_its_start():
    target = jr.normal(jr.key(0), (4, 3)) / 2
    start = lrjax.balance(random_low_rank(jr.key(1), 4, 3, 2, dtype=jnp.float64))

    def product(size):
        grown = jax.tree.map(lambda x: size * x, start)
        return flows.riccati(jnp.array(0.8), grown, target).product

    slope = jax.jvp(product, (1.0,), (1.0,))[1]
    assert_close(slope, (product(1 + 1e-6) - product(1 - 1e-6)) / 2e-6, rtol=1e-7)


@pytest.mark.slow
def test_riccati_with_a_zero_target_is_decay():
    """``dZ/dt = −½ Z ZᵀZ`` has ``Z Zᵀ = Z₀ (I + t Z₀ᵀZ₀)⁻¹ Z₀ᵀ``."""
    start = lrjax.balance(random_low_rank(jr.key(0), 5, 4, 2, dtype=jnp.float64))
    z = jnp.concatenate([start.left, start.right])
    for t in (0.0, 0.7, 1e3):
        want = z @ jnp.linalg.solve(jnp.eye(2) + t * z.T @ z, z.T)
        blocks = flows.riccati(jnp.array(t), start, jnp.zeros((5, 4)))
        assert_close(blocks.product, want[:5, 5:], condition=100)
        assert_close(blocks.left_gram, want[:5, :5], condition=100)
        assert_close(blocks.right_gram, want[5:, 5:], condition=100)
