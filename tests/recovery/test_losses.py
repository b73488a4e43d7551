import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from lrjax import recovery

from ..helpers import assert_close


OBJECTIVES = (
    recovery.L1(),
    recovery.Squared(),
    recovery.Huber(0.3),
    recovery.Quantile(0.2),
)
RESIDUALS = jnp.array([-2.0, -0.31, -0.1, 0.2, 0.29, 5.0])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_subgradient_is_the_derivative(objective):
    assert_close(jax.grad(objective)(RESIDUALS), objective.subgradient(RESIDUALS))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_subgradient_inequality_also_at_the_kink(objective):
    points = jnp.concatenate([RESIDUALS, jnp.zeros(1)])
    value = objective.pointwise(points)
    linear = value[:, None] + objective.subgradient(points)[:, None] * (
        points[None, :] - points[:, None]
    )
    assert bool(jnp.all(linear <= value[None, :] + 1e-6))
    assert float(objective.pointwise(jnp.zeros(()))) == 0


def test_limits_of_the_family():
    wide, narrow = recovery.Huber(1e3), recovery.Huber(1e-3)
    assert_close(wide(RESIDUALS), recovery.Squared()(RESIDUALS))
    assert_close(narrow(RESIDUALS) / 1e-3, recovery.L1()(RESIDUALS), rtol=2e-3)
    assert_close(2 * recovery.Quantile(0.5)(RESIDUALS), recovery.L1()(RESIDUALS))


def test_quantile_is_minimized_by_the_quantile():
    y = jnp.linspace(0, 1, 101)
    grid = jnp.linspace(0, 1, 401)
    loss = jax.vmap(lambda x: recovery.Quantile(0.8)(x - y))(grid)
    assert abs(float(grid[jnp.argmin(loss)]) - 0.2) < 0.006


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gross_targets_count_less_by_a_constant(objective, size, x64):
    """Whatever is measured, also beyond the limit: 200 quartiles are about 60 here."""
    targets = jr.normal(jr.key(0), (40,)).at[::4].multiply(size)
    away = jr.normal(jr.key(1), (5, 40)) * jnp.array([[0.0], [1.0], [30.0], [1e3], [1e6]])
    plain = lambda measured: objective(measured - targets)
    less = lambda measured: objective.between(measured, targets)
    constants = jax.vmap(lambda a: plain(a) - less(a))(away)
    assert_close(constants, jnp.broadcast_to(constants[0], (5,)), condition=1e12)
    assert_close(jax.vmap(jax.grad(less))(away), jax.vmap(jax.grad(plain))(away))
    has_tails = not isinstance(objective, recovery.Squared)
    assert bool(constants[0] > 1) == (size > 1 and has_tails)


@pytest.mark.slow
def test_the_loss_tells_matrices_apart_beside_errors_of_any_size():
    """The difference of two losses is the same in float32 at 10 and at 10⁹ times."""
    targets = jr.normal(jr.key(0), (400,))
    gross = jnp.where(jnp.arange(400) % 4 == 0, 1e9 * jnp.sign(targets), targets)
    large = jnp.where(jnp.arange(400) % 4 == 0, 10 * jnp.sign(targets), targets)
    measured = jr.normal(jr.key(1), (2, 400)) * 1e-3
    for objective in (recovery.L1(), recovery.Huber(0.1), recovery.Quantile(0.3)):
        differences = [
            objective.between(measured[0], y) - objective.between(measured[1], y)
            for y in (gross, large)
        ]
        assert_close(*differences, rtol=0.05)
