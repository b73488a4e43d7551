import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax import linalg
from tests.helpers import all_finite, assert_close, relative_error, with_spectrum


truncated_svd = jax.jit(
    linalg.truncated_svd, static_argnums=1, static_argnames=("method", "power_iters")
)
product_svd = jax.jit(linalg.product_svd, static_argnums=3, static_argnames="method")
principal_angles = jax.jit(linalg.principal_angles)
METHODS = ["exact", "randomized", "power"]


@pytest.mark.slow_but("shape0-exact", "shape0-power")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60, 25), (25, 60)])
def test_recovers_a_low_rank_matrix(getkey, x64, method, shape):
    values = np.array([9.0, 4.0, 1.0, 0.1])
    x = with_spectrum(getkey(), *shape, values, jnp.float64)
    u, s, v = map(np.asarray, truncated_svd(x, 4, method=method, key=getkey()))
    assert_close(s, values, condition=100)
    assert_close(u.T @ u, np.eye(4))
    assert_close(v.T @ v, np.eye(4))
    assert_close((u * s[None]) @ v.T, x, condition=100)


@pytest.mark.slow
def test_power_from_a_warm_start_contracts_at_its_rate(getkey, x64):
    """tan of the angle to the leading subspace falls by (σ_{r+1}/σ_r)² an iteration."""
    gap, rng = 0.7, np.random.default_rng(getkey.seed)
    x = with_spectrum(getkey(), 40, 40, [3.0, 2.0, 2.0 * gap, 0.1], jnp.float64)
    v = np.asarray(truncated_svd(x, 2).right)
    start = v + 0.05 * rng.standard_normal(v.shape)
    tangents = []
    for iters in (8, 9, 10):
        got = truncated_svd(x, 2, method="power", start=start, power_iters=iters).right
        tangents.append(np.tan(np.asarray(principal_angles(got, v)).max()))
    rates = np.array(tangents[1:]) / np.array(tangents[:-1])
    np.testing.assert_allclose(rates, gap**2, rtol=0.02)


def test_randomized_is_near_optimal(getkey):
    x = np.asarray(with_spectrum(getkey(), 120, 80, 1.0 / np.arange(1, 81)))
    best = np.sqrt(np.sum(1.0 / np.arange(11, 81) ** 2))
    for _ in range(5):
        u, s, v = map(np.asarray, truncated_svd(x, 10, method="randomized", key=getkey()))
        assert np.linalg.norm(x - (u * s[None]) @ v.T) < 1.02 * best


@pytest.mark.parametrize("method", METHODS)
def test_finite_for_zero_and_deficient_input_and_batches(getkey, method):
    rng = np.random.default_rng(getkey.seed)
    x = (rng.standard_normal((20, 1)) * rng.standard_normal((1, 10))).astype(np.float32)
    stack = np.stack([np.zeros_like(x), x])
    out = jax.device_get(truncated_svd(stack, 3, method=method, key=getkey()))
    assert all_finite(out)
    assert relative_error((out.left[1] * out.values[1][None]) @ out.right[1].T, x) < 1e-5


@pytest.mark.parametrize("rank", [0, 6])
def test_refuses_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=r"between 1 and min\(m, n\) = 5"):
        linalg.truncated_svd(jnp.ones((5, 7)), rank)


def test_needs_a_key_or_a_start():
    with pytest.raises(ValueError, match="key="):
        linalg.truncated_svd(jnp.ones((5, 7)), 2, method="randomized")


@pytest.mark.parametrize("method", ["cholesky", "qr"])
def test_product_svd_keeps_columns_a_billion_times_smaller(method, getkey):
    """In single precision, where a common scale of the columns would lose them."""
    rng = np.random.default_rng(getkey.seed)
    basis = lambda n: np.linalg.qr(rng.standard_normal((n, 4)))[0].astype(np.float32)
    u, v = basis(30), basis(20)
    sizes = np.array([1.0, 1e-9, 1.0, 1e-9], np.float32)
    want = np.array([4.0, 3.0, 2.0, 1.0], np.float32)
    core = np.diag(want / sizes**2)
    got = product_svd(u * sizes, core, v * sizes, 4, method=method)
    one = np.ones(4, np.float32)
    assert_close(got.values, want, condition=10)
    assert_close(np.abs(np.sum(got.left * u, axis=0)), one, condition=10)
    assert_close(np.abs(np.sum(got.right * v, axis=0)), one, condition=10)


def test_principal_angles_of_known_subspaces(getkey, x64):
    angles, rng = np.array([1e-9, 0.3, 1.2]), np.random.default_rng(getkey.seed)
    q = np.linalg.qr(rng.standard_normal((30, 6)))[0]
    x, perp = q[:, :3], q[:, 3:]
    y = x * np.cos(angles) + perp * np.sin(angles)
    mixed = y @ rng.standard_normal((3, 3))
    got = principal_angles(x, mixed)
    np.testing.assert_allclose(got, angles, rtol=1e-6)
    np.testing.assert_allclose(principal_angles(mixed, x[:, :2]).shape, (2,))


def test_principal_angles_refuse_two_spaces():
    with pytest.raises(ValueError, match="one space"):
        linalg.principal_angles(jnp.ones((4, 2)), jnp.ones((5, 2)))
