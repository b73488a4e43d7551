"""A run that is saved and restored goes on bit for bit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import orbax.checkpoint as ocp
import pytest

from tests.contract.test_every_transform import step
from tests.helpers import assert_close
from tests.registry import PARAMS, PARTS


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


@pytest.mark.parametrize("entry", PARTS.values(), ids=PARTS.keys())
def test_restored_states_continue_bit_for_bit(entry, tmp_path):
    params = PARAMS[entry.params](jr.key(7), jnp.float32)
    tx = entry.make()
    shapes = jax.eval_shape(tx.init, params)
    if not jax.tree.leaves(shapes):
        return  # nothing to store
    one = jax.jit(lambda state: step(tx, state, params))
    _, state = one(jax.jit(tx.init)(params))
    want, _ = one(state)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    restored = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", shapes)
    assert_close(one(restored)[0], want, rtol=0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_close(one(restored)[0], want, rtol=0)
