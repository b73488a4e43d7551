"""A run that is saved and taken up by another process goes on bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lrjax


ROOT = Path(__file__).parents[2]
OPTIMIZER = "lrjax.subspace_adam(1e-2, 4, blocks=2, key=jax.random.key(3))"
RESUME = f"""
import sys, jax, jax.random as jr, numpy as np, orbax.checkpoint as ocp, lrjax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
tx = {OPTIMIZER}
params = {{"w": jax.ShapeDtypeStruct((8, 12), "float32")}}
with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(sys.argv[1], jax.eval_shape(tx.init, params))
update = jax.jit(tx.update)
for k in (2, 3):
    updates, state = update({{"w": jr.normal(jr.key(k), (8, 12))}}, state)
np.save(sys.argv[2], updates["w"])
"""


@pytest.mark.slow
def test_another_process_goes_on_bit_for_bit(tmp_path):
    tx = eval(OPTIMIZER, {"lrjax": lrjax, "jax": jax})
    update = jax.jit(tx.update)
    state = tx.init({"w": jr.normal(jr.key(9), (8, 12))})
    for k in range(4):
        if k == 2:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", state)
        updates, state = update({"w": jr.normal(jr.key(k), (8, 12))}, state)
    arguments = [str(tmp_path / "state"), str(tmp_path / "updates.npy")]
    subprocess.run(
        [sys.executable, "-c", RESUME, *arguments], check=True, cwd=ROOT, env={**os.environ}
    )
    np.testing.assert_array_equal(np.load(arguments[1]), updates["w"])
