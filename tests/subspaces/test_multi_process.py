"""Two processes, one mesh: each holds half of the rows and of the optimizer's state."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PROCESS = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=rank)
import jax.random as jr, numpy as np, lrjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
by_rows = NamedSharding(mesh, P("rows", None))
whole = [np.asarray(jr.normal(jr.key(k), (8, 12))) for k in range(2)]
grads = [jax.make_array_from_callback((8, 12), by_rows, lambda at: g[at]) for g in whole]
tx = lrjax.subspace_adam(1e-2, 4, blocks=2)
specs = lrjax.state_specs(tx, grads[0], by_rows)
state = jax.jit(tx.init, out_shardings=specs)(grads[0])
update = jax.jit(tx.update, out_shardings=(by_rows, specs))
alone = jax.jit(tx.update)
kept = jax.jit(tx.init)(whole[0])
for g, w in zip(grads, whole):
    updates, state = update(g, state)
    want, kept = alone(w, kept)
assert state[0].basis.sharding.is_equivalent_to(by_rows, 2)
for got, full in ((updates, want), (state[0].basis, kept[0].basis)):
    (mine,) = got.addressable_shards
    assert mine.data.shape[0] == 4
    error = np.abs(np.asarray(mine.data) - np.asarray(full)[mine.index]).max()
    assert error < 1e-4 * np.abs(full).max(), error
"""


@pytest.mark.slow
def test_two_processes_step_like_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(rank)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
