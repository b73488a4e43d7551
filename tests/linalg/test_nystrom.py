"""Sketches of an operator by its products: bounds, exactness, preconditioning."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from lrjax import linalg


N = 60


def with_eigenvalues(key, values):
    q = np.linalg.qr(np.asarray(jr.normal(key, (N, N))))[0]
    return (q * np.asarray(values)) @ q.T


FALLING = 10.0 ** -np.linspace(0, 5, N)


def split(x):
    """A vector, or columns of vectors, as a tree."""
    return {"a": x[:20].reshape(5, 4, *x.shape[1:]), "b": x[20:]}


def whole(tree):
    return jnp.concatenate([tree["a"].reshape(20, *tree["a"].shape[2:]), tree["b"]])


def sketch(c, rank, key, as_tree):
    if as_tree:
        product = lambda x: split(c @ whole(x))
        values, basis = linalg.nystrom_sketch(product, split(c[0]), rank, key=key)
        return values, whole(basis)
    return linalg.nystrom_sketch(lambda x: c @ x, c[0], rank, key=key)


run = jax.jit(sketch, static_argnums=(1, 3))


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("as_tree", [False, True])
def test_lies_between_zero_and_the_operator(as_tree, getkey, x64):
    c = with_eigenvalues(getkey(), FALLING)
    values, u = map(np.asarray, run(c, 10, getkey(), as_tree))
    assert np.all(values >= 0)
    assert np.all(np.diff(values) <= 0)
    np.testing.assert_allclose(u.T @ u, np.eye(10), atol=1e-12)
    assert np.linalg.eigvalsh(c - (u * values) @ u.T)[0] > -1e-12


def test_is_exact_at_the_rank_of_the_operator(getkey, x64):
    few = np.where(np.arange(N) < 6, FALLING, 0)
    for eigenvalues, rank in ((few, 6), (FALLING, N)):
        c = with_eigenvalues(getkey(), eigenvalues)
        values, u = map(np.asarray, run(c, rank, getkey(), False))
        # The shift of rounding size is what is lost.
        np.testing.assert_allclose((u * values) @ u.T, c, atol=1e-11)


@pytest.mark.slow_but("float32")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_indefinite_operator_is_shifted(dtype, getkey, x64):
    """By no more than twice its most negative eigenvalue; the large ones stay."""
    rest = np.linspace(-1, 1, N - 4)
    eigenvalues = np.concatenate([[100.0, 50.0, 20.0, 10.0], rest])
    c = with_eigenvalues(getkey(), eigenvalues).astype(dtype)
    values, u = (np.asarray(x, np.float64) for x in run(c, 30, getkey(), True))
    # (C + sI) ⪰ its sketch for s ≥ 1, and s ≤ 2: so C + 2I ⪰ (U Λ Uᵀ + s U Uᵀ) ⪰ U Λ Uᵀ.
    assert np.linalg.eigvalsh(c + 2 * np.eye(N) - (u * values) @ u.T)[0] > -1e-3
    np.testing.assert_allclose(values[:2], [100, 50], rtol=0.1)
    assert np.linalg.matrix_rank(u[:, values > 0], tol=0.5) == np.sum(values > 0)


@pytest.mark.slow
def test_at_full_rank_the_preconditioner_is_the_operator(getkey, x64):
    c = with_eigenvalues(getkey(), FALLING)
    p = linalg.nystrom_preconditioner(lambda x: c @ x, c[0], N, damping=1e-3, key=getkey())
    want = (c + 1e-3 * np.eye(N)) / (FALLING[-1] + 1e-3)
    np.testing.assert_allclose(p.as_matrix(), want, rtol=0, atol=1e-6 * want.max())


@pytest.mark.slow
def test_conjugate_gradients_take_fewer_steps(getkey, x64):
    """The bound of the paper: the preconditioned condition is of the order of λ_r/μ."""
    c = with_eigenvalues(getkey(), FALLING)
    damping, tag = 1e-5, lx.positive_semidefinite_tag
    b, key = np.ones(N), getkey()

    @jax.jit
    def solve(c):
        a = lx.MatrixLinearOperator(c + damping * jnp.eye(N), tag)
        p = linalg.nystrom_preconditioner(
            lambda x: c @ x, b, 30, damping=damping, key=key
        ).inverse()
        cg = lambda options: lx.linear_solve(a, b, lx.CG(1e-8, 1e-8), options=options)
        root = jnp.linalg.cholesky(p.as_matrix())
        condition = jnp.linalg.cond(root.T @ a.as_matrix() @ root)
        return cg({"preconditioner": p}), cg({}), condition

    with_it, without, condition = solve(c)
    want = np.linalg.solve(c + damping * np.eye(N), b)
    np.testing.assert_allclose(with_it.value, want, rtol=1e-4)
    assert condition < 1.1e5 / 50
    assert 2 * with_it.stats["num_steps"] < without.stats["num_steps"]


@pytest.mark.slow
def test_zero_is_finite():
    values, u = linalg.nystrom_sketch(lambda x: 0 * x, jnp.ones(4), 2, key=jr.key(0))
    p = linalg.nystrom_preconditioner(lambda x: 0 * x, jnp.ones(4), 2, key=jr.key(0))
    assert np.all(values == 0)
    assert np.all(np.isfinite(u))
    np.testing.assert_allclose(p.as_matrix(), np.eye(4), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 5])
def test_refuses_a_rank_that_no_operator_has(rank):
    with pytest.raises(ValueError, match="between 1 and the 4 numbers"):
        linalg.nystrom_sketch(lambda x: x, jnp.ones(4), rank, key=jr.key(0))
