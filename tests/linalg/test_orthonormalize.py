import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import orthonormalize
from lrjax.linalg.orthonormalize import _one_by_one
from tests.helpers import all_finite, assert_close, relative_error, tol
from tests.linalg.test_gram import matrices, normal


METHODS = ["qr", "cholesky"]
jitted = jax.jit(orthonormalize, static_argnames="method")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_orthonormal_and_spans_the_columns(getkey, method, condition):
    x = normal(getkey, 200, 8) * np.geomspace(1, 1 / condition, 8, dtype=np.float32)
    q = np.asarray(jitted(x, method=method))
    assert relative_error(q.T @ q, np.eye(8)) <= tol(q)
    assert relative_error(q @ (q.T @ x), x) <= tol(q)
    upper = q.T @ x
    assert (np.diag(upper) > 0).all()
    assert relative_error(np.triu(upper), upper) <= tol(q)


def test_the_two_methods_agree(getkey, x64):
    x = normal(getkey, 60, 5)
    assert_close(jitted(x, method="cholesky"), jitted(x, method="qr"), condition=100)


@pytest.mark.parametrize("method", METHODS)
def test_finite_for_every_matrix(getkey, method):
    for name, x in matrices(getkey).items():
        q = np.asarray(jitted(x, method=method))
        assert np.all(np.isfinite(q)), name
        assert np.linalg.norm(q, ord=2) <= 1 + tol(q), name


def test_qr_completes_a_rank_deficient_basis(getkey):
    x = normal(getkey, 20, 3)
    for deficient in (np.zeros_like(x), x[:, [0, 1, 0]]):
        q = np.asarray(jitted(deficient))
        assert_close(q.T @ q, np.eye(3, dtype=np.float32))


def test_columns_may_change_sign_without_moving_the_others(getkey):
    x = normal(getkey, 20, 4)
    signs = np.array([1.0, -1.0, -1.0, 1.0], np.float32)
    assert_close(np.asarray(jitted(x * signs)) * signs, jitted(x), condition=10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_and_batch(getkey, method, dtype):
    x = normal(getkey, 3, 12, 4).astype(dtype)
    q = jitted(x, method=method)
    assert q.dtype == dtype
    loop = np.stack([jitted(a, method=method) for a in x])
    assert_close(q, loop, condition=10)


def test_not_differentiated_through(getkey):
    x = jr.normal(getkey(), (5, 2))
    assert not jax.grad(lambda a: orthonormalize(a).sum())(x).any()


def test_refuses_a_wide_matrix():
    with pytest.raises(ValueError, match=r"tall matrix.*\(2, 5\)"):
        orthonormalize(jnp.ones((2, 5)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outside", [1.0, 1e-3, 1e-6])
def test_within_the_complement_of_other_columns(getkey, method, outside):
    """Down to what little of x lies outside of the other columns."""
    basis = np.linalg.qr(normal(getkey, 2, 40, 9))[0]
    others, rest = basis[..., :5], basis[..., 5:]
    inside = others @ normal(getkey, 2, 5, 4)
    x = inside + np.float32(outside) * rest
    padded = np.concatenate([others, np.zeros((2, 40, 3), np.float32)], axis=-1)
    q = np.asarray(jitted(x, method=method, against=padded))
    assert_close(q.mT @ q, np.broadcast_to(np.eye(4, dtype=np.float32), (2, 4, 4)))
    assert np.abs(q.mT @ others).max() <= tol(q)
    assert_close(q, rest, condition=1 / outside)


def test_the_complement_of_everything_is_finite(getkey):
    others = orthonormalize(jr.normal(getkey(), (8, 4)))
    for method in METHODS:
        assert all_finite(orthonormalize(others[:, :2], method=method, against=others))


def test_one_by_one_is_a_batch(getkey):
    x = jr.normal(getkey(), (2, 3, 6, 4))
    wanted = jnp.linalg.qr(x)
    for f in (_one_by_one, jax.vmap(_one_by_one)):
        for got, expected in zip(f(x), wanted, strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize("batched", [orthonormalize, jax.vmap(orthonormalize)])
@pytest.mark.parametrize(("side", "loops"), [(256, False), (512, True)])
def test_a_gpu_factorizes_many_large_matrices_one_by_one(batched, side, loops):
    program = jax.jit(batched).trace(jax.ShapeDtypeStruct((16, side, 8), jnp.float32))
    text = lambda platform: program.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text("cuda")) is loops
    assert "stablehlo.while" not in text("cpu")
