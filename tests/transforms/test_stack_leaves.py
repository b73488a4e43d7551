"""Leaves of one shape as one stack: the same steps, the same state by name."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from lrjax import subspaces as sub
from tests.helpers import assert_close


EVERY = lambda path, shape: len(shape) >= 2


def model(key):
    """Three alike, one turned, one of another dtype, a vector and a leaf that is None."""
    keys = jr.split(key, 6)
    return {
        "attention": {
            name: jr.normal(k, (9, 12)) for name, k in zip("qkv", keys, strict=False)
        },
        "mlp": [
            jr.normal(keys[3], (12, 9)),
            jr.normal(keys[4], (9, 12)).astype(jnp.bfloat16),
        ],
        "bias": jr.normal(keys[5], (12,)),
        "none": None,
    }


def seen(tx):
    """A transform that notes the shapes that it is given."""
    shapes = []

    def update(updates, state, params=None):
        shapes.append([x.shape for x in jax.tree.leaves(updates)])
        return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update), shapes


RECIPES = {
    "subspace_adam": lrjax.subspace_adam(1e-2, 3),
    "galore": lrjax.galore(1e-2, 3, refresh_every=2, stagger=False),
    "ldadam": lrjax.ldadam(1e-2, 3),
    "dion": lrjax.dion(1e-2, 3),
    "quantized": lrjax.quantize_state(lrjax.subspace_adam(1e-2, 3), min_size=8),
    "chain": optax.chain(
        optax.trace(0.9), lrjax.orthogonalize_updates(), optax.scale(-1.0)
    ),
}


@pytest.mark.slow_but("chain")
@pytest.mark.parametrize("name", RECIPES)
def test_stacked_steps_are_the_steps_apart(getkey, name):
    """From one state, in which every leaf has a basis of its own, to the next ones."""
    tx, params = RECIPES[name], model(getkey())
    stacked = lrjax.stack_leaves(tx)
    state = tx.init(params)
    gradients = [model(getkey()) for _ in range(3)]

    def run(tx, state):
        out = []
        for g in gradients:
            updates, state = jax.jit(tx.update)(g, state, params)
            out.append(updates)
        return out, state

    start = stacked.init(params)
    assert jax.tree.structure(start) == jax.tree.structure(state)
    same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert jax.tree.all(jax.tree.map(same, start, state))
    # Rounding in another order, on which columns of nearly equal size turn.
    assert_close(run(stacked, state), run(tx, state), condition=100)


def test_members_of_a_group_become_one_leaf(getkey):
    params = model(getkey())
    tx, shapes = seen(optax.scale(2.0))
    stacked = lrjax.stack_leaves(tx)
    updates, _ = stacked.update(params, stacked.init(params))
    assert shapes == [[(3, 9, 12), (12,), (12, 9), (9, 12)]]
    assert_close(updates, jax.tree.map(lambda x: 2 * x, params))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_size": 9 * 12 - 1},
        {"alike": lambda path, sides: path},
        {
            "where": lambda path, shape: (
                sub.MatrixSpec((0,), (1,)) if len(shape) == 2 else False
            )
        },
        {"where": lambda path, shape: len(shape) == 2},  # says no of a stack
    ],
    ids=["size", "alike", "from the front", "no stacks"],
)
def test_what_differs_stays_apart(getkey, settings):
    params = model(getkey())
    tx, shapes = seen(optax.identity())
    stacked = lrjax.stack_leaves(tx, **settings)
    stacked.update(params, stacked.init(params))
    assert shapes == [[x.shape for x in jax.tree.leaves(params)]]


def test_a_limit_of_none_stacks_everything(getkey):
    params = {name: jnp.ones((600, 600)) for name in "ab"}
    for limit, count in ((None, 1), (600**2, 1), (600**2 - 1, 2)):
        tx, shapes = seen(optax.identity())
        stacked = lrjax.stack_leaves(tx, max_size=limit)
        stacked.update(params, stacked.init(params))
        assert len(shapes[0]) == count


@pytest.mark.slow
def test_ranks_by_path_are_respected(getkey):
    params = {name: jnp.ones((9, 12)) for name in "abcd"}
    rank = lambda path, sides: 2 if path in "ab" else 4
    tx = lrjax.project_updates(optax.scale_by_adam(), sub.Power(rank))
    state = lrjax.stack_leaves(tx, alike=rank).init(params)
    assert [state.inner.mu[name].shape for name in "abcd"] == [(2, 12)] * 2 + [(4, 12)] * 2


def test_a_state_of_the_whole_stack_is_refused():
    """The norm of a leaf as a whole is no state of its members."""
    params = {name: jnp.ones((9, 12)) for name in "ab"}
    norm = lambda tree: jax.tree.map(lambda x: jnp.zeros(()), tree)
    update = lambda updates, state, params=None: (updates, norm(updates))
    tx = lrjax.stack_leaves(optax.GradientTransformation(norm, update))
    with pytest.raises(ValueError, match="cannot take apart a state that holds"):
        tx.init(params)


def test_extra_arguments_like_the_tree_are_stacked(getkey):
    params = model(getkey())

    def update(updates, state, params=None, *, grad, value):
        return jax.tree.map(lambda u, g: u + value * g, updates, grad), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = lrjax.stack_leaves(inner)
    got, _ = tx.update(params, tx.init(params), params, grad=params, value=2.0)
    assert_close(got, jax.tree.map(lambda x: x + 2.0 * x, params))
