import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import NamedSharding, PartitionSpec

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
        return operator.matrices.reshape(-1, M, N)
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


@pytest.mark.slow
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
    u = jr.normal(getkey(), (M, 3))
    assert_close(operator.adjoint_rmatmul(y, u), want.T @ u)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_to_machine_precision(kind, getkey, x64):
    operator = make(kind, getkey(), jnp.float64)
    x = random_low_rank(getkey(), M, N, 2, dtype=jnp.float64)
    y = jr.normal(getkey(), operator(x).shape, jnp.float64)
    forward = jnp.sum(operator(x) * y)
    backward = jnp.sum(x.materialize() * operator.adjoint(y))
    size = jnp.linalg.norm(operator(x)) * jnp.linalg.norm(y)
    assert abs(forward - backward) <= 1e-14 * size


@pytest.mark.slow_but("rank_one", "entries", "identity")
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_entries_block_by_block_are_entries_at_once(getkey, monkeypatch):
    operator = make("entries", getkey(), jnp.float32)
    x, move = random_low_rank(getkey(), M, N, 2), random_low_rank(getkey(), M, N, 2)
    y, v = jr.normal(getkey(), (COUNT,)), jr.normal(getkey(), (N, 3))

    def everything(x):
        loss = recovery.Problem(operator, y, recovery.Squared()).loss
        return (
            operator(x),
            operator.adjoint_matmul(y, v),
            jax.grad(loss)(x),
            jax.jvp(jax.grad(loss), (x,), (move,))[1],
        )

    want = jax.jit(everything)(x)
    monkeypatch.setattr(recovery.problems.operators, "BLOCK", 4)
    xs = jax.tree.map(lambda a: a[None], x)
    got = jax.jit(jax.vmap(lambda x: everything(x)))(xs)
    assert_close(jax.tree.map(lambda a: a[0], got), want, condition=10)


@pytest.fixture(scope="module")
def many_entries():
    """A problem whose entries fill several blocks, and a start."""
    dims, count = (2000, 1000), 5 * recovery.problems.operators.BLOCK
    places = jr.randint(jr.key(0), (2, count), 0, jnp.array([[2000], [1000]]))
    operator = recovery.Entries(places[0], places[1], dims)
    targets = jr.normal(jr.key(1), (count,))
    problem = recovery.Problem(operator, targets, recovery.Squared())
    return problem, random_low_rank(jr.key(2), *dims, 20)


@pytest.mark.slow
def test_gradients_of_entries_take_the_memory_of_the_data(many_entries):
    problem, x = many_entries
    compiled = jax.jit(lambda p, x: jax.grad(p.loss)(x)).lower(problem, x).compile()
    data = sum(leaf.nbytes for leaf in jax.tree.leaves(problem))
    gathered = problem.targets.nbytes * x.rank
    temporary = compiled.memory_analysis().temp_size_in_bytes
    blocks = 2 * recovery.problems.operators.BLOCK * x.rank * 4
    assert temporary < 2 * data + blocks < gathered


@pytest.mark.slow
def test_sharded_entries_are_gathered_where_they_are(many_entries):
    problem, x = many_entries
    mesh = jax.make_mesh((8,), ("entries",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("entries"))
    placed = jax.device_put(problem, spread)
    here = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(lambda p, x: jax.value_and_grad(p.loss)(x))
    compiled = step.lower(placed, here).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(placed, here), step(problem, x), condition=10)


class Diagonals(recovery.Operator):
    """Sums of the entries along the rows, and the entry in the corner: a user's own."""

    weights: jax.Array

    @property
    def shape(self):
        return M, N

    def __call__(self, x):
        sums = x.left @ (self.weights.T @ x.right).T
        return jnp.concatenate([sums.ravel(), x.left[:1] @ x.right[0]])


@pytest.mark.slow
def test_a_users_own_operator_needs_shape_and_call_only(getkey, x64):
    operator = Diagonals(jr.normal(getkey(), (N, 4), jnp.float64))
    y = jr.normal(getkey(), (4 * M + 1,), jnp.float64)
    x = random_low_rank(getkey(), M, N, 2, dtype=jnp.float64)
    adjoint = operator.adjoint(y)
    assert_close(jnp.sum(operator(x) * y), jnp.sum(x.materialize() * adjoint), condition=10)
    v, u = (jr.normal(getkey(), (k, 3), jnp.float64) for k in (N, M))
    assert_close(operator.adjoint_matmul(y, v), adjoint @ v)
    assert_close(operator.adjoint_rmatmul(y, u), adjoint.T @ u)


@pytest.mark.slow
def test_a_users_own_operator_and_objective_are_solved(x64):
    class LogCosh(recovery.Objective):
        def pointwise(self, r):
            return jnp.logaddexp(r, -r)

    keys = jr.split(jr.key(0), 3)
    operator = Diagonals(jr.normal(keys[0], (N, 12), jnp.float64))
    truth = random_low_rank(keys[1], M, N, 1, dtype=jnp.float64)
    problem = recovery.Problem(operator, operator(truth), LogCosh(), truth)
    start = lrjax.spectral_init(problem, 1, key=keys[2], trim=0.0)
    assert problem.relative_error(start) < 0.8
    solution = jax.jit(lambda p, x: lrjax.solve(p, lrjax.scaled_gd(0.02), x, steps=500))(
        problem, start
    )
    assert problem.relative_error(solution.x) < 1e-6
