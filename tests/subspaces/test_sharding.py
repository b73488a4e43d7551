"""The default optimizer on eight devices: same numbers, few bytes on the wire."""

import math
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
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


sub = lrjax.subspaces
BASES = {
    "power": sub.Power(4),
    "power(blocks)": sub.Power(4, blocks=2),
    "power(qr)": sub.Power(4, blocks=2, method="qr"),
    "svd": sub.SVD(4),
    "gram_eigh": sub.GramEigh(4),
    "randomized_svd": sub.RandomizedSVD(4),
    "range_finder": sub.RangeFinder(4),
    "random_orthonormal": sub.RandomOrthonormal(4),
    "gaussian": sub.Gaussian(4),
    "sampled_svd": sub.SampledSVD(4),
    "oja": sub.Oja(4),
    "coap": sub.CorrelationDescent(4),
    "geodesic": sub.Geodesic(4),
    "ema_gram": sub.EmaGram(4),
}


@pytest.mark.slow_but("power", "power(qr)")
@pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
def test_every_basis_lives_on_explicit_meshes(basis):
    """Types tell: JAX tracks shardings in them, so that nothing need be compiled."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    tx = lrjax.project_updates(
        optax.scale_by_adam(), basis, schedule=sub.Periodic(2, when="after")
    )
    specs = {"rows": P("x", None), "both": P("y", "x"), "stack": P("x", None, None)}
    shapes = {"rows": (16, 32), "both": (32, 16), "stack": (4, 8, 12)}
    with jax.set_mesh(mesh):
        grads = {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
            )
            for name, shape in shapes.items()
        }
        state = jax.eval_shape(tx.init, grads)
        updates, after = jax.eval_shape(tx.update, grads, state)
    shardings = lambda tree: jax.tree.map(
        lambda x: P(*[None] * x.ndim) if x.sharding is None else x.sharding.spec, tree
    )
    assert shardings(after) == shardings(state)
    assert shardings(updates) == specs
