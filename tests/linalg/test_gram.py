import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import linalg
from lrjax.linalg import together
from tests.helpers import all_finite, assert_close, relative_error, tol


def on_host(function, **options):
    """One program for each shape, and results in NumPy."""
    jitted = jax.jit(function, **options)
    return lambda *args, **kwargs: jax.device_get(jitted(*args, **kwargs))


gram = on_host(linalg.gram)
inverse_gram = on_host(linalg.inverse_gram, static_argnames="relative")
inverse_grams = on_host(linalg.inverse_grams)
inverse_root_gram = on_host(linalg.inverse_root_gram)
inverse_root_grams = on_host(linalg.inverse_root_grams)
orthonormalizers = on_host(linalg.orthonormalizers)


def normal(getkey, *shape):
    """A draw on the host, in float64 where that is on."""
    rng = np.random.default_rng(np.asarray(jr.key_data(getkey())))
    return rng.standard_normal(shape).astype(jnp.zeros(()).dtype)


def matrices(getkey):
    """Tall matrices that break naive inverses."""
    x = normal(getkey, 50, 6)
    found = {
        "full": x,
        "repeated columns": np.concatenate([x[:, :3], x[:, :3]], axis=1),
        "rank one": x[:, :1] @ np.ones((1, 6)),
        "zero": np.zeros_like(x),
        "one zero column": np.where(np.arange(6) == 2, 0, x),
        "single column": x[:, :1],
        "tiny": 1e-15 * x,
        "huge": 1e15 * x,
        "graded": x * np.logspace(0, -12, 6),
    }
    return {name: matrix.astype(x.dtype) for name, matrix in found.items()}


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("relative", [True, False])
def test_inverse_gram_is_finite_for_every_matrix(getkey, damping, relative):
    for name, x in matrices(getkey).items():
        inverse = inverse_gram(x, damping, relative=relative)
        assert all_finite(inverse), name
        assert all_finite(x @ inverse), name


def test_inverse_gram_inverts(getkey, x64):
    x = normal(getkey, 40, 5)
    for damping in (0.0, 0.3):
        damped = x.T @ x + damping * np.eye(5)
        assert_close(
            inverse_gram(x, damping, relative=False) @ damped, np.eye(5), condition=1e2
        )
    mean = np.trace(x.T @ x) / 5
    assert_close(inverse_gram(x, 0.1), inverse_gram(x, 0.1 * mean, relative=False))


def test_root_squares_to_the_inverse_and_whitens(getkey, x64):
    x = normal(getkey, 40, 5)
    root = inverse_root_gram(x, 0.1)
    assert_close(root @ root.T, inverse_gram(x, 0.1))
    white = x @ inverse_root_gram(x)
    assert_close(white.T @ white, np.eye(5), condition=1e2)


def test_zero_has_the_pseudo_inverse_zero():
    assert not inverse_gram(jnp.zeros((4, 2))).any()
    np.testing.assert_allclose(
        inverse_gram(jnp.zeros((4, 2)), 0.5, relative=False), 2 * np.eye(2), rtol=1e-6
    )


def test_relative_damping_scales_with_the_matrix(getkey):
    x = normal(getkey, 30, 4)
    assert_close(inverse_gram(10 * x, 0.1) * 100, inverse_gram(x, 0.1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_runs_in_float32_at_least(getkey, dtype):
    x = normal(getkey, 30, 4).astype(dtype)
    assert gram(x).dtype == inverse_gram(x).dtype == jnp.float32
    assert relative_error(gram(x), gram(x.astype(jnp.float32))) <= tol(gram(x))


def test_batch_is_a_loop(getkey):
    x = normal(getkey, 2, 3, 20, 4)
    out = inverse_gram(x, 0.01)
    for i in range(2):
        for j in range(3):
            assert_close(out[i, j], inverse_gram(x[i, j], 0.01), condition=10)
    assert_close(
        jax.jit(jax.vmap(jax.vmap(lambda a: linalg.inverse_gram(a, 0.01))))(x), out
    )


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_orthonormalizers_are_undamped_on_the_way_in_and_damped_back(getkey, x64, damping):
    x, y = normal(getkey, 2, 30, 5)
    y = y * np.logspace(0, -3, 5)
    for z, (k, b) in zip((x, y), orthonormalizers(x, y, damping=damping), strict=True):
        white = z @ k
        assert_close(white.T @ white, np.eye(5), condition=1e8)
        assert_close(k @ b, inverse_gram(z, damping), condition=1e8)


def test_orthonormalizers_are_finite_for_every_matrix(getkey):
    for name, x in matrices(getkey).items():
        for damping in (0.0, 1e-2):
            ((k, b),) = orthonormalizers(x, damping=damping)
            white = x @ k
            assert all_finite((k, b, white)), name
            # Columns are at most shortened, where the matrix is deficient in rank.
            assert np.linalg.norm(white, 2) < 1 + 1e-2, name
        if not x.any():
            assert not np.abs(np.asarray(b)).max() > 1e-10


def test_together_takes_batches_of_what_is_alike(getkey):
    small, large = (
        jnp.asarray(normal(getkey, k, *n)) for k, n in ((3, (2, 2)), (2, (3, 3)))
    )
    calls = []

    def double(x):
        calls.append(x.shape)
        return 2 * x

    mixed = [small[0], large[0], small[1], small[2], large[1], jnp.ones((200, 200))]
    for got, x in zip(together(double, mixed), mixed, strict=True):
        assert_close(got, 2 * x)
    assert sorted(calls) == [(2, 3, 3), (3, 2, 2), (200, 200)]


def test_gradient_is_finite_at_repeated_columns(getkey):
    x = normal(getkey, 20, 2)
    x = np.concatenate([x, x], axis=1)
    assert all_finite(jax.jit(jax.grad(lambda a: jnp.sum(linalg.inverse_gram(a, 1e-3))))(x))


@pytest.mark.parametrize(
    "shapes", [((7, 3), (5, 3)), ((2, 7, 3), (2, 5, 3)), ((7, 3), (5, 4))]
)
def test_several_at_once_are_each_by_itself(getkey, shapes):
    xs = [normal(getkey, *shape) for shape in shapes]
    for several, one in (
        (inverse_grams, inverse_gram),
        (inverse_root_grams, inverse_root_gram),
    ):
        for got, x in zip(several(*xs, damping=0.1), xs, strict=True):
            assert_close(got, one(x, 0.1), condition=1e2)
