"""Every vector field is that of a transform, and follows its exact solution."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from lrjax import LowRank, flows, gradient_flow

from ..helpers import assert_close, random_low_rank
from .conftest import Aligned, approximation


FIELDS = {
    "plain": optax.identity(),
    "gram": lrjax.scale_by_gram(),
    "tangent": lrjax.scale_by_tangent(),
    "alternating average": optax.chain(lrjax.scale_by_gram(), optax.scale(0.5)),
    "smooth spectral": lrjax.scale_by_smooth_polar(0.1),
    "sign": optax.scale_by_sign(),
    "polyak": optax.chain(lrjax.scale_by_gram(), lrjax.scale_by_polyak()),
}


@pytest.mark.slow_but("plain")
@pytest.mark.parametrize("field", FIELDS)
def test_one_step_of_sgd_is_one_euler_step(field):
    x = random_low_rank(jr.key(0), 6, 5, 2, dtype=jnp.float64)
    target = jr.normal(jr.key(1), (6, 5))
    tx = optax.chain(FIELDS[field], optax.scale_by_learning_rate(0.03))

    @jax.jit
    def step(x):
        value, grad = jax.value_and_grad(approximation)(x, target)
        updates, _ = tx.update(grad, tx.init(x), x, value=value, grad=grad)
        return optax.apply_updates(x, updates)

    euler = gradient_flow(
        approximation,
        x,
        target,
        t1=0.03,
        step=0.03,
        precondition=FIELDS[field],
        solver=diffrax.Euler(),
    )
    assert euler.stats.steps == 1
    assert_close(euler.params, step(x))


def euler_product_velocity(tx, x, target):
    """Velocity of the product when both factors move."""
    grad = jax.grad(approximation)(x, target)
    p, _ = tx.update(grad, tx.init(x), x)
    return -(p.left @ x.right.T + x.left @ p.right.T)


def projectors(x):
    ql, qr = jnp.linalg.qr(x.left)[0], jnp.linalg.qr(x.right)[0]
    return ql @ ql.T, qr @ qr.T


@pytest.mark.slow
def test_what_each_preconditioner_does_to_the_product():
    x = random_low_rank(jr.key(2), 6, 5, 2, dtype=jnp.float64)
    target = jr.normal(jr.key(3), (6, 5))
    left, right = projectors(x)
    e = target - x.materialize()
    tangent = left @ e + e @ right - left @ e @ right
    got = euler_product_velocity(lrjax.scale_by_tangent(), x, target)
    assert_close(got, tangent, condition=100)
    got = euler_product_velocity(FIELDS["alternating average"], x, target)
    assert_close(got, (left @ e + e @ right) / 2, condition=100)
    # Two small alternating steps move as twice the average does.
    h = 1e-6
    tx = lrjax.scale_by_gram(order="alternating")
    state, y = tx.init(x), x
    for _ in range(2):
        updates, state = tx.update(jax.grad(approximation)(y, target), state, y)
        y = optax.apply_updates(y, jax.tree.map(lambda u: -h * u, updates))
    moved = (y.materialize() - x.materialize()) / h
    assert_close(moved, left @ e + e @ right, rtol=1e-4)


def test_the_tangent_step_is_the_same_for_every_split_of_the_product():
    x = random_low_rank(jr.key(4), 6, 5, 2, dtype=jnp.float64)
    target = jr.normal(jr.key(5), (6, 5))
    q = jr.normal(jr.key(6), (2, 2))
    other = LowRank(x.left @ q, x.right @ jnp.linalg.inv(q).T)
    tx = lrjax.scale_by_tangent()
    assert_close(
        euler_product_velocity(tx, other, target),
        euler_product_velocity(tx, x, target),
        condition=1e3,
    )


def final_products(aligned, times, precondition, **options):
    def end(t1):
        x = gradient_flow(
            approximation,
            aligned.start,
            aligned.target,
            t1=t1,
            precondition=precondition,
            **options,
        ).params
        return aligned.u.T @ x.materialize() @ aligned.v

    return jax.jit(jax.vmap(end))(times)


def diagonals(values):
    return jax.vmap(jnp.diag)(values) if values.ndim == 2 else jnp.diag(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precondition", "solution"),
    [
        (lrjax.scale_by_gram(), flows.scaled_modes),
        (lrjax.scale_by_tangent(), flows.tangent_modes),
    ],
)
def test_preconditioned_modes_have_one_rate(precondition, solution):
    aligned = Aligned(
        left=(0.5, 0.02, -1.0), right=(0.2, 3.0, 0.3), sigma=(100.0, 2.0, 0.1)
    )
    times = jnp.linspace(0.3, 3, 10)
    got = final_products(aligned, times, precondition, rtol=1e-11, atol=1e-12)
    want = solution(times, aligned.left * aligned.right, aligned.sigma)
    assert jnp.max(jnp.abs(got - diagonals(want))) <= 1e-9


@pytest.mark.slow
def test_scaled_flow_conserves_the_ratio_of_aligned_factors(aligned):
    start = LowRank(aligned.u * 0.5, aligned.v * 0.1)
    x = gradient_flow(
        approximation,
        start,
        aligned.target,
        t1=2.0,
        precondition=lrjax.scale_by_gram(),
        rtol=1e-10,
    ).params
    ratios = jnp.linalg.norm(x.left, axis=0) / jnp.linalg.norm(x.right, axis=0)
    assert_close(ratios, jnp.full(3, 5.0), rtol=1e-9)
    assert lrjax.metrics.balance_drift(x, start) > 0.1


@pytest.mark.slow
def test_spectral_modes_grow_at_unit_rate():
    # Smoothing β costs about β/σ of accuracy before the first mode arrives at t = 0.9,
    # and 1/β steps after that: beyond it the flow slides along the singularity.
    aligned = Aligned(left=(0.1,) * 3, right=(0.1,) * 3, sigma=(9.0, 4.0, 1.0))
    ts = jnp.linspace(0, 2.0, 11)
    errors = []
    for beta in (1e-2, 1e-3):
        x = gradient_flow(
            approximation,
            aligned.start,
            aligned.target,
            t1=2.0,
            ts=ts,
            rtol=1e-6,
            atol=1e-8,
            precondition=lrjax.scale_by_smooth_polar(beta),
        ).params
        got = jnp.einsum("mk,tmn,nj->tkj", aligned.u, x.materialize(), aligned.v)
        want = flows.spectral_modes(ts, aligned.left**2, aligned.sigma)
        errors.append(float(jnp.max(jnp.abs(got - diagonals(want)))))
    assert errors[0] < 5e-2
    assert errors[1] < errors[0] / 5


@pytest.mark.slow
def test_spectral_modes_before_the_first_arrival():
    aligned = Aligned(left=(0.1,) * 3, right=(0.1,) * 3, sigma=(9.0, 4.0, 1.0))
    x = gradient_flow(
        approximation,
        aligned.start,
        aligned.target,
        t1=0.8,
        rtol=1e-11,
        atol=1e-12,
        precondition=lrjax.scale_by_smooth_polar(1e-6),
    ).params
    want = flows.spectral_modes(jnp.array(0.8), aligned.left**2, aligned.sigma)
    got = aligned.u.T @ x.materialize() @ aligned.v
    assert jnp.max(jnp.abs(got - diagonals(want))) <= 1e-9


@pytest.mark.slow
def test_sign_flow_has_unit_speed_in_every_number():
    target = jnp.array([[3.0, -2.0], [1.5, 5.0]])
    loss = lambda x, y: 0.5 * jnp.sum((x - y) ** 2)
    x = gradient_flow(
        loss, jnp.zeros((2, 2)), target, t1=1.2, precondition=optax.scale_by_sign()
    ).params
    assert_close(x, 1.2 * jnp.sign(target))


@pytest.mark.slow
def test_damping_may_be_a_tracer(aligned):
    def end(damping):
        return gradient_flow(
            approximation,
            aligned.start,
            aligned.target,
            t1=1.0,
            precondition=lrjax.scale_by_gram(damping, relative=False),
        ).params

    batch = jax.vmap(end)(jnp.array([0.0, 0.1]))
    assert_close(jax.tree.map(lambda x: x[1], batch), end(0.1), rtol=1e-7)
