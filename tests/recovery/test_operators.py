import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import lrjax
from lrjax import recovery

from ..helpers import assert_close, random_low_rank


M, N, COUNT = 7, 5, 11


def make(kind, key, dtype):
    if kind == "dense":
        return recovery.DenseSensing(jr.normal(key, (COUNT, M * N), dtype), (M, N))
    if kind == "rank_one":
        ka, kb = jr.split(key)
        return recovery.RankOneSensing(
            jr.normal(ka, (COUNT, M), dtype), jr.normal(kb, (COUNT, N), dtype)
        )
    if kind == "entries":
        places = jr.randint(key, (COUNT,), 0, M * N)  # with repetitions
        return recovery.Entries(places // N, places % N, (M, N))
    if kind == "masked":
        return recovery.Masked(jr.bernoulli(key, 0.5, (M, N)))
    return recovery.Identity((M, N))


def dense_matrices(kind, operator):
    """What the operator measures, written down entry by entry."""
    if kind == "dense":
        return operator.rows.reshape(-1, M, N)
    if kind == "rank_one":
        return jnp.einsum("km,kn->kmn", operator.a, operator.b)
    if kind == "entries":
        return jnp.stack(
            [
                jnp.zeros((M, N)).at[i, j].set(1)
                for i, j in zip(operator.rows, operator.cols, strict=True)
            ]
        )
    basis = jnp.eye(M * N).reshape(-1, M, N)
    return basis if kind == "identity" else basis * operator.mask[None]


KINDS = ("dense", "rank_one", "entries", "masked", "identity")


@pytest.mark.parametrize("kind", KINDS)
def test_measures_inner_products(kind, getkey):
    operator = make(kind, getkey(), jnp.float32)
    x = random_low_rank(getkey(), M, N, 2)
    matrices = dense_matrices(kind, operator)
    want = jnp.einsum("kmn,mn->k", matrices, x.materialize())
    assert_close(operator(x).ravel(), want)
    y = jr.normal(getkey(), operator(x).shape)
    want = jnp.einsum("kmn,k->mn", matrices, y.ravel())
    assert_close(operator.adjoint(y), want)
    v = jr.normal(getkey(), (N, 3))
    assert_close(operator.adjoint_matmul(y, v), want @ v)
    assert_close(operator.T(x.T).T, operator(x))
    assert_close(operator.T.adjoint(y.T), want.T)


@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_to_machine_precision(kind, getkey, x64):
    operator = make(kind, getkey(), jnp.float64)
    x = random_low_rank(getkey(), M, N, 2, dtype=jnp.float64)
    y = jr.normal(getkey(), operator(x).shape, jnp.float64)
    forward = jnp.sum(operator(x) * y)
    backward = jnp.sum(x.materialize() * operator.adjoint(y))
    size = jnp.linalg.norm(operator(x)) * jnp.linalg.norm(y)
    assert abs(forward - backward) <= 1e-14 * size


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_adjoint_times_the_other_factor(kind, getkey):
    operator = make(kind, getkey(), jnp.float32)
    x = random_low_rank(getkey(), M, N, 2)
    y = jr.normal(getkey(), operator(x).shape)
    problem = recovery.Problem(operator, y, recovery.L1())
    grad = jax.grad(problem.loss)(x)
    s = operator.adjoint(jnp.sign(operator(x) - y))
    assert_close(grad, lrjax.LowRank(s @ x.right, s.T @ x.left))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_operators_is_a_loop(kind, getkey):
    operators = [make(kind, key, jnp.float32) for key in jr.split(getkey(), 3)]
    xs = [random_low_rank(key, M, N, 2) for key in jr.split(getkey(), 3)]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    want = jnp.stack([a(x) for a, x in zip(operators, xs, strict=True)])
    in_axes = (None if kind == "identity" else 0, 0)
    got = jax.vmap(lambda a, x: a(x), in_axes)(stack(operators), stack(xs))
    assert_close(got, want)


def test_members_that_share_a_dense_operator_become_one_matrix_product(getkey):
    problem = lrjax.matrix_sensing(getkey(), (M, N), 2, COUNT)
    xs = random_low_rank(getkey(), M, N, 2, batch=(4,))
    step = jax.jit(jax.vmap(jax.value_and_grad(lambda x, p: p.loss(x)), in_axes=(0, None)))
    text = step.lower(xs, problem).as_text()
    products = [
        line for line in text.splitlines() if f"tensor<{COUNT}x{M * N}xf32>" in line
    ]
    products = [line for line in products if "dot_general" in line]
    assert len(products) == 2
    assert all("batching_dims" not in line and "4x" in line for line in products)


def test_wrong_shapes_are_refused(getkey):
    x = random_low_rank(getkey(), N, M, 2)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"\(7, 5\).*\(5, 7\)"):
            make(kind, getkey(), jnp.float32)(x)
    with pytest.raises(ValueError, match="35"):
        recovery.DenseSensing(jnp.ones((COUNT, 3)), (M, N))
    with pytest.raises(ValueError, match="as many"):
        recovery.RankOneSensing(jnp.ones((2, M)), jnp.ones((3, N)))
    with pytest.raises(ValueError, match="as many"):
        recovery.Entries(jnp.ones(2, int), jnp.ones(3, int), (M, N))
