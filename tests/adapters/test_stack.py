"""Many adapters as one: taken out of a stack again, mixed, swapped and trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import moved
from tests.helpers import assert_close


MODEL = eqx.filter_jit(lambda key: eqx.nn.MLP(6, 5, 8, 2, key=key))(jr.key(0))
PATHS = ["layers.0", "layers.1", "layers.2"]


@eqx.filter_jit
def trained(kind, key, where=None):
    """Adapters with random numbers in the place of what training would leave."""
    params, frozen = lrjax.partition(lrjax.adapt(MODEL, kind, where=where, key=key))
    return eqx.combine(moved(params, key), frozen)


@eqx.filter_jit
def served(stack, ids, xs):
    """Every example by its own adapter."""

    def one(i, x):
        return lrjax.bind(MODEL, room.select(stack, i))(x)

    return jax.vmap(one)(ids, xs)


@eqx.filter_jit
def alone(adapters, xs):
    return jax.vmap(lrjax.bind(MODEL, adapters))(xs)


def weights(adapters):
    """The adapted weights and biases in float64."""
    merged = eqx.filter_jit(lrjax.merge)(MODEL, adapters)
    leaves = jax.tree.leaves(eqx.filter(merged, eqx.is_array))
    return [np.asarray(x, np.float64) for x in leaves]


def first(path, layer):
    return path == "layers.0"


def last_two(path, layer):
    return path != "layers.0"


# Adapters that stand in one stack although they differ: ranks, scales, starts, kinds.
ROWS = {
    "ranks and scales": [(lrjax.LoRA(1, 4), None), (lrjax.LoRA(3, 2), None)],
    "rank-stabilized": [(lrjax.LoRA(2, 4, rank_stabilized=True), None)] * 2
    + [(lrjax.LoRA(3, 4, rank_stabilized=True), None)],
    "two laws of the scale": [
        (lrjax.LoRA(2, 4, rank_stabilized=True), None),
        (lrjax.LoRA(4, 4), None),
    ],
    "layers": [(lrjax.LoRA(2), first), (lrjax.LoRA(1), last_two)],
    "products": [
        (lrjax.LoRA(2, init="pissa"), None),
        (lrjax.VeRA(4), None),
        (lrjax.LoRA(1, dropout=0.5), None),
    ],
    "random zeros": [(room.CapaBoost(1), None), (room.CapaBoost(2), None)],
    "lengths": [(lrjax.DoRA(1), first), (lrjax.DoRA(3), None)],
    "biases": [(room.WithBias(lrjax.LoRA(2)), None), (room.WithBias(lrjax.LoRA(1)), first)],
    "copies": [(room.Full(), first), (room.Full(), None)],
    "trained pools": [(lrjax.TiedLoRA(2), None), (lrjax.TiedLoRA(2), last_two)],
}


@pytest.mark.parametrize("name", ROWS)
def test_each_example_gets_its_own(name, getkey):
    row = [trained(kind, getkey(), where) for kind, where in ROWS[name]]
    stack = room.stack(row, MODEL, pad_rank=3)
    xs = jr.normal(getkey(), (7, 6))
    wants = [jax.vmap(MODEL)(xs), *(alone(own, xs) for own in row)]
    for ids in (jr.randint(getkey(), (7,), 0, len(stack)), jnp.arange(7) % len(stack)):
        want = np.stack([np.asarray(wants[i])[k] for k, i in enumerate(ids)])
        assert_close(served(stack, ids, xs), want, condition=100)
    # And the base to the last bit, for nothing is added to it.
    np.testing.assert_array_equal(served(stack, jnp.zeros(7, int), xs), wants[0])
