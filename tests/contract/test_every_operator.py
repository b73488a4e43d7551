"""What every measurement operator and every objective must do."""

import inspect

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from lrjax import recovery
from tests.helpers import assert_close, random_low_rank


M, N, COUNT = 7, 5, 11
OPERATORS = {
    "DenseSensing": lambda key: (jr.normal(key, (COUNT, M * N)), (M, N)),
    "RankOneSensing": lambda key: tuple(
        jr.normal(k, (COUNT, n)) for k, n in zip(jr.split(key), (M, N), strict=True)
    ),
    "Entries": lambda key: (
        jr.randint(key, (COUNT,), 0, M),  # with repetitions
        jr.randint(jr.fold_in(key, 1), (COUNT,), 0, N),
        (M, N),
    ),
    "Masked": lambda key: (jr.bernoulli(key, 0.5, (M, N)),),
    "Identity": lambda key: ((M, N),),
}
OBJECTIVES = {"L1": (), "Squared": (), "Huber": (0.7,), "Quantile": (0.25,)}
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def make(name, seed=0):
    return getattr(recovery, name)(*OPERATORS[name](jr.key(seed)))


def public(base):
    found = {n: x for n, x in vars(recovery).items() if inspect.isclass(x)}
    return {n for n, x in found.items() if issubclass(x, base) and x is not base}


def test_all_are_here(monkeypatch):
    assert public(recovery.Operator) == set(OPERATORS)
    assert public(recovery.Objective) == set(OBJECTIVES)
    newcomer = type("Newcomer", (recovery.Operator,), {})
    monkeypatch.setattr(recovery, "Newcomer", newcomer, raising=False)
    assert public(recovery.Operator) - set(OPERATORS) == {"Newcomer"}


@every_operator
def test_adjoint_identity(name):
    """⟨A(X), y⟩ = ⟨X, A*(y)⟩, and its products with thin matrices are its products."""
    operator = make(name)
    x, u = random_low_rank(jr.key(1), M, N, 2), jr.normal(jr.key(2), (M, 3))
    v = jr.normal(jr.key(3), (N, 3))
    y = jr.normal(jr.key(4), operator(x).shape)
    dense = operator.adjoint(y)
    assert dense.shape == operator.shape == (M, N)
    assert_close(jnp.vdot(x.materialize(), dense), jnp.vdot(operator(x), y), condition=100)
    assert_close(operator.adjoint_matmul(y, v), dense @ v, condition=10)
    if hasattr(operator, "adjoint_rmatmul"):
        assert_close(operator.adjoint_rmatmul(y, u), dense.T @ u, condition=10)


@every_operator
def test_jit_is_eager_and_nothing_is_closed_over(name):
    operator, x = make(name), random_low_rank(jr.key(1), M, N, 2)
    both = lambda operator, x: (operator(x), operator.adjoint(operator(x)))
    assert_close(jax.jit(both)(operator, x), both(operator, x), condition=10)
    leaves, structure = jax.tree.flatten(operator)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert_close(jax.tree.unflatten(structure, leaves)(x), operator(x), rtol=0)
    assert repr(operator).startswith(f"{name}(")


@pytest.mark.slow_but("Masked")
@every_operator
def test_vmap_is_a_loop(name):
    """Over matrices that share an operator, and over operators."""
    operator, other = make(name), make(name, seed=5)
    many = random_low_rank(jr.key(1), M, N, 2, batch=(3,))
    member = lambda i: jax.tree.map(lambda x: x[i], many)
    back = lambda operator, x: operator.adjoint(operator(x))
    got = jax.vmap(back, in_axes=(None, 0))(operator, many)
    assert_close(
        got, jnp.stack([back(operator, member(i)) for i in range(3)]), condition=10
    )
    if not jax.tree.leaves(operator):
        return
    two = jax.tree.map(lambda a, b: jnp.stack([a, b]), operator, other)
    got = jax.vmap(back, in_axes=(0, None))(two, member(0))
    want = jnp.stack([back(each, member(0)) for each in (operator, other)])
    assert_close(got, want, condition=10)


@every_objective
def test_objectives_are_convex_functions_with_a_subgradient(name):
    objective = getattr(recovery, name)(*OBJECTIVES[name])
    r, s = jnp.linspace(-2.0, 2.0, 9), jr.normal(jr.key(0), (9,))
    value, slope = objective(r), objective.subgradient(r)
    assert objective(s) >= value + jnp.vdot(slope, s - r) - 1e-5
    smooth = r[r != 0]
    assert_close(jax.grad(objective)(smooth), objective.subgradient(smooth))
    assert objective.subgradient(jnp.zeros(2)).tolist() == [0.0, 0.0]
    assert objective(jnp.zeros(2)) == 0


@pytest.mark.slow_but("Huber")
@every_objective
def test_objectives_under_transformations(name):
    objective = getattr(recovery, name)(*OBJECTIVES[name])
    r = jr.normal(jr.key(0), (4, 6))
    both = lambda f, r: (f(r), f.subgradient(r))
    assert_close(jax.jit(lambda r: both(objective, r))(r), both(objective, r))
    alone = [both(objective, x) for x in r]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    assert_close(jax.vmap(lambda r: both(objective, r))(r), stacked)
    leaves, structure = jax.tree.flatten(objective)
    assert_close(jax.tree.unflatten(structure, leaves)(r), objective(r), rtol=0)
    if leaves:  # its numbers may be swept
        many = jax.vmap(lambda x: type(objective)(x)(r))(jnp.array([*leaves, 0.4]))
        assert_close(many[0], objective(r))
