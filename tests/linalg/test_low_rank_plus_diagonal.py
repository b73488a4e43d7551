"""Low rank plus diagonal against dense matrices, and as lineax uses it."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from lrjax.linalg import LowRankPlusDiagonal, Woodbury, tall_svd
from tests.helpers import relative_error


N, R = 12, 3
VALUES = np.array([1e6, 3.0, 0.0])


def parts(key, kind, dtype=jnp.float64):
    """The operator on a vector or a tree; with one number or more on the diagonal."""
    basis = jr.normal(key, (N, R), dtype)
    if kind == "orthonormal":
        basis = jnp.linalg.qr(basis)[0]
    d = jnp.linspace(0.5, 4.0, N, dtype=dtype)
    if kind in ("number", "orthonormal"):
        d = jnp.asarray(0.5, dtype)
    if kind == "tree":
        split = lambda x: {"a": x[:6].reshape(2, 3, *x.shape[1:]), "b": [x[6:]]}
        basis, d = split(basis), split(d)
    return LowRankPlusDiagonal(
        basis, jnp.asarray(VALUES, dtype), d, orthonormal=kind == "orthonormal"
    )


def dense(operator, dtype=None):
    flat = lambda tree, *end: np.concatenate(
        [np.asarray(x, dtype).reshape(-1, *end) for x in jax.tree.leaves(tree)]
    )
    u = flat(operator.basis, R)
    d = flat(operator.diagonal)
    return (u * np.asarray(operator.values)) @ u.T + np.diag(np.broadcast_to(d, N))


kinds = pytest.mark.parametrize("kind", ["number", "diagonal", "orthonormal", "tree"])


@kinds
def test_products_and_solutions_are_those_of_the_dense_matrix(kind, getkey, x64):
    operator = parts(getkey(), kind)
    want = dense(operator)
    run = jax.jit(lambda a: (a.as_matrix(), a.inverse().as_matrix(), lx.diagonal(a)))
    matrix, inverse, diagonal = run(operator)
    scale = np.abs(want).max()
    np.testing.assert_allclose(matrix, want, atol=1e-12 * scale)
    np.testing.assert_allclose(diagonal, np.diag(want), atol=1e-12 * scale)
    np.testing.assert_allclose(inverse, np.linalg.inv(want), atol=1e-10)


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("as_tree", [False, True])
def test_nearly_parallel_columns_keep_their_digits(as_tree, getkey):
    """Columns that agree to 1e-3: in float32 their Gram matrix has one digit left."""
    near = jr.normal(getkey(), (N, 1)) + 1e-3 * jr.normal(getkey(), (N, R))
    tree = lambda x: {"a": x[:6].reshape(2, 3, *x.shape[1:]), "b": x[6:]}
    form = tree if as_tree else (lambda x: x)
    operator = LowRankPlusDiagonal(form(near), jnp.full(R, 1e6), 0.5)
    b = jr.normal(getkey(), (N,))
    found = jax.jit(lambda a, x: a.inverse().mv(x))(operator, form(b))
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])
    want = np.linalg.solve(dense(operator, np.float64), np.asarray(b, np.float64))
    # eps σ₁/σ₂ = 1.2e-7 · 2e3; the usual form is off by the square of it times 1/eps: 0.1.
    assert relative_error(found, want) < 1e-3


@pytest.mark.slow
def test_lineax_solves_differentiates_and_batches(getkey, x64):
    u, b = jr.normal(getkey(), (N, R)), jr.normal(getkey(), (N,))
    values, d = jnp.array([5.0, 1.0, 0.1]), jnp.linspace(0.5, 4.0, N)

    def solve(u, values, d, b):
        return lx.linear_solve(LowRankPlusDiagonal(u, values, d), b, Woodbury()).value

    def directly(u, values, d, b):
        return jnp.linalg.solve(jnp.einsum("nr,r,mr->nm", u, values, u) + jnp.diag(d), b)

    grads = lambda f: jax.grad(lambda *x: jnp.sum(f(*x) ** 3), argnums=(0, 1, 2, 3))
    both = jax.jit(lambda *x: (grads(solve)(*x), grads(directly)(*x)))
    for got, want in zip(*both(u, values, d, b), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-11 * float(jnp.abs(want).max()))
    scales = jnp.array([1.0, 7.0])
    many = jax.jit(jax.vmap(lambda s: solve(u, s * values, d, b)))(scales)
    np.testing.assert_allclose(many[1], directly(u, 7 * values, d, b), atol=1e-12)


def test_lineax_knows_what_it_is(getkey):
    operator = parts(getkey(), "diagonal", jnp.float32)
    for a in (operator, operator.inverse()):
        assert lx.is_symmetric(a)
        assert lx.is_positive_semidefinite(a)
        assert not lx.is_diagonal(a)
        assert a.T is a
        assert lx.linearise(a) is a
        assert a.in_size() == N


def test_conjugate_gradients_take_it_as_matrix_and_as_preconditioner(getkey):
    """Preconditioned by its own inverse a system is the identity: one or two steps."""
    operator = parts(getkey(), "number", jnp.float32)
    b = jr.normal(getkey(), (N,))
    solver = lx.CG(1e-3, 1e-3)
    options = {"preconditioner": operator.inverse()}
    found = jax.jit(lambda a, b: lx.linear_solve(a, b, solver, options=options))(
        operator, b
    )
    assert found.stats["num_steps"] <= 3


def test_svd_in_leaves_is_that_of_the_stacked_matrix(getkey, x64):
    """Columns of sizes 1 and 1e-9, and one that is the sum of two others."""
    x = np.array(jr.normal(getkey(), (N, 4)))
    x[:, 1] *= 1e-9
    x[:, 3] = x[:, 0] + x[:, 2]
    leaves = [jnp.asarray(x[:2]), jnp.asarray(x[2:8].reshape(3, 2, 4)), jnp.asarray(x[8:])]
    u, values, vt = jax.tree.map(np.asarray, jax.jit(tall_svd)(leaves))
    u = np.concatenate([a.reshape(-1, 4) for a in u])
    np.testing.assert_allclose((u * values) @ vt, x, atol=1e-13)
    want = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(values, want, atol=1e-14 * want[0])
    np.testing.assert_allclose(u[:, :3].T @ u[:, :3], np.eye(3), atol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": -jnp.ones(R)}, "values >= 0"),
        ({"values": jnp.ones(R + 1)}, "as long as its values"),
        ({"diagonal": 0.0}, "diagonal > 0"),
        ({"diagonal": jnp.ones(N + 1)}, "shape of the vectors"),
    ],
)
def test_refuses(change, message):
    good = {"basis": jnp.ones((N, R)), "values": jnp.ones(R), "diagonal": 1.0}
    with pytest.raises(ValueError, match=message):
        LowRankPlusDiagonal(**{**good, **change})


def test_woodbury_refuses_other_operators():
    other = lx.MatrixLinearOperator(jnp.eye(2), lx.positive_semidefinite_tag)
    with pytest.raises(TypeError, match="LowRankPlusDiagonal"):
        lx.linear_solve(other, jnp.ones(2), Woodbury())
