import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import (
    gram,
    inverse_gram,
    inverse_grams,
    inverse_root_gram,
    inverse_root_grams,
    orthonormalizers,
    together,
)
from tests.helpers import all_finite, assert_close, relative_error, tol


def matrices(key, dtype=jnp.float32):
    """Tall matrices that break naive inverses."""
    x = jr.normal(key, (50, 6), dtype)
    return {
        "full": x,
        "repeated columns": x.at[:, 3:].set(x[:, :3]),
        "rank one": x[:, :1] @ jnp.ones((1, 6), dtype),
        "zero": jnp.zeros_like(x),
        "one zero column": x.at[:, 2].set(0),
        "single column": x[:, :1],
        "tiny": x * jnp.asarray(1e-15, dtype),
        "huge": x * jnp.asarray(1e15, dtype),
        "graded": x * jnp.logspace(0, -12, 6, dtype=dtype)[None],
    }


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("relative", [True, False])
def test_inverse_gram_is_finite_for_every_matrix(getkey, damping, relative):
    for name, x in matrices(getkey()).items():
        inverse = inverse_gram(x, damping, relative=relative)
        assert all_finite(inverse), name
        assert all_finite(x @ inverse), name


def test_inverse_gram_inverts(getkey, x64):
    x = jr.normal(getkey(), (40, 5), jnp.float64)
    for damping in (0.0, 0.3):
        damped = x.T @ x + damping * jnp.eye(5)
        assert_close(
            inverse_gram(x, damping, relative=False) @ damped, jnp.eye(5), condition=1e2
        )
    mean = jnp.trace(x.T @ x) / 5
    assert_close(inverse_gram(x, 0.1), inverse_gram(x, 0.1 * mean, relative=False))


def test_root_squares_to_the_inverse_and_whitens(getkey, x64):
    x = jr.normal(getkey(), (40, 5), jnp.float64)
    root = inverse_root_gram(x, 0.1)
    assert_close(root @ root.T, inverse_gram(x, 0.1))
    white = x @ inverse_root_gram(x)
    assert_close(white.T @ white, jnp.eye(5), condition=1e2)


def test_zero_has_the_pseudo_inverse_zero():
    assert not inverse_gram(jnp.zeros((4, 2))).any()
    np.testing.assert_allclose(
        inverse_gram(jnp.zeros((4, 2)), 0.5, relative=False), 2 * np.eye(2), rtol=1e-6
    )


def test_relative_damping_scales_with_the_matrix(getkey):
    x = jr.normal(getkey(), (30, 4))
    assert_close(inverse_gram(10 * x, 0.1) * 100, inverse_gram(x, 0.1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_runs_in_float32_at_least(getkey, dtype):
    x = jr.normal(getkey(), (30, 4)).astype(dtype)
    assert gram(x).dtype == inverse_gram(x).dtype == jnp.float32
    assert relative_error(gram(x), gram(x.astype(jnp.float32))) <= tol(gram(x))


def test_batch_is_a_loop(getkey):
    x = jr.normal(getkey(), (2, 3, 20, 4))
    out = inverse_gram(x, 0.01)
    for i in range(2):
        for j in range(3):
            assert_close(out[i, j], inverse_gram(x[i, j], 0.01), condition=10)
    assert_close(jax.vmap(jax.vmap(lambda a: inverse_gram(a, 0.01)))(x), out)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_orthonormalizers_are_undamped_on_the_way_in_and_damped_back(getkey, x64, damping):
    x, y = jr.normal(getkey(), (2, 30, 5), jnp.float64)
    y = y * jnp.logspace(0, -3, 5)[None]
    for z, (k, b) in zip((x, y), orthonormalizers(x, y, damping=damping), strict=True):
        white = z @ k
        assert_close(white.T @ white, jnp.eye(5), condition=1e8)
        assert_close(k @ b, inverse_gram(z, damping), condition=1e8)


def test_orthonormalizers_are_finite_for_every_matrix(getkey):
    for name, x in matrices(getkey()).items():
        for damping in (0.0, 1e-2):
            ((k, b),) = orthonormalizers(x, damping=damping)
            white = x @ k
            assert all_finite((k, b, white)), name
            # Columns are at most shortened, where the matrix is deficient in rank.
            assert np.linalg.norm(white, 2) < 1 + 1e-2, name
        if not x.any():
            assert not np.abs(np.asarray(b)).max() > 1e-10


def test_together_takes_batches_of_what_is_alike(getkey):
    small, large = jr.normal(getkey(), (3, 2, 2)), jr.normal(getkey(), (2, 3, 3))
    calls = []

    def double(x):
        calls.append(x.shape)
        return 2 * x

    mixed = [small[0], large[0], small[1], small[2], large[1], jnp.ones((200, 200))]
    for got, x in zip(together(double, mixed), mixed, strict=True):
        assert_close(got, 2 * x)
    assert sorted(calls) == [(2, 3, 3), (3, 2, 2), (200, 200)]


def test_gradient_is_finite_at_repeated_columns(getkey):
    x = jr.normal(getkey(), (20, 2))
    x = jnp.concatenate([x, x], axis=1)
    assert all_finite(jax.grad(lambda a: jnp.sum(inverse_gram(a, 1e-3)))(x))


@pytest.mark.parametrize(
    "shapes", [((7, 3), (5, 3)), ((2, 7, 3), (2, 5, 3)), ((7, 3), (5, 4))]
)
def test_several_at_once_are_each_by_itself(getkey, shapes):
    xs = [jr.normal(getkey(), shape) for shape in shapes]
    for several, one in (
        (inverse_grams, inverse_gram),
        (inverse_root_grams, inverse_root_gram),
    ):
        for got, x in zip(several(*xs, damping=0.1), xs, strict=True):
            assert_close(got, one(x, 0.1), condition=1e2)
