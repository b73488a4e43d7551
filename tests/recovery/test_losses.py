import jax
import jax.numpy as jnp
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
