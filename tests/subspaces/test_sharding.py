"""The default optimizer on eight devices: same numbers, few bytes on the wire."""

import math
import re

import jax
import jax.random as jr
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax

from ..helpers import assert_close


def collective_bytes(text):
    """Bytes of the results of all collectives in a compiled program."""
    operation = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
    total = 0
    for found in re.finditer(rf"= ([^=\n]*?) (?:{operation})(?:-start)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found.group(1)):
            total += sizes[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "spec", "limit"),
    [
        ((512, 1536), P("x", None), 0.15),
        ((512, 1536), P(None, "x"), 0.15),
        ((8, 64, 128), P("x"), 0.0),
    ],
    ids=["rows", "columns", "stack"],
)
def test_collectives_move_a_small_part_of_the_gradient(shape, spec, limit):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    g = jr.normal(jr.key(0), shape)
    tx = lrjax.subspace_adam(1e-3, 64 if len(shape) == 2 else 8)
    state = jax.jit(tx.init)(g)
    update = jax.jit(tx.update)
    want, _ = update(g, state)
    sharded = jax.device_put(g, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        compiled = update.lower(sharded, jax.jit(tx.init)(sharded)).compile()
        got, _ = update(sharded, jax.jit(tx.init)(sharded))
    assert_close(jax.device_get(got), jax.device_get(want), condition=1e3)
    text = compiled.as_text()
    assert collective_bytes(text) <= limit * g.size * 4
    assert "all-gather" not in text
    if limit:
        assert collective_bytes(text) > 0
