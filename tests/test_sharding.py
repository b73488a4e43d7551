"""Products on Explicit meshes: where the result lies, and what it takes to get it there."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from lrjax._sharding import einsum
from tests.helpers import assert_close


@pytest.mark.slow_but("does not divide")
@pytest.mark.parametrize(
    ("columns", "lies", "collective"),
    [
        (32, P(None, None, ("y", "x")), "reduce-scatter"),
        (12, P(None, None, "y"), "all-reduce"),
    ],
    ids=["scattered", "does not divide"],
)
def test_sums_are_scattered_where_they_are_made(columns, lies, collective, getkey):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    basis = jr.normal(getkey(), (1, 16, 4))  # one for the whole stack
    g = jr.normal(getkey(), (3, 16, columns))
    project = lambda p, g: einsum("...pr,...pq->...rq", p, g, onto="q")
    placed = put(basis, P(None, "x")), put(g, P(None, "x", "y"))
    compiled = jax.jit(project).lower(*placed).compile()
    got = compiled(*placed)
    assert_close(jax.device_get(got), jax.device_get(project(basis, g)))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, lies), 3)
    text = compiled.as_text() or ""
    kinds = ("reduce-scatter", "all-reduce", "all-gather", "all-to-all")
    assert [kind for kind in kinds if f" {kind}(" in text] == [collective]
    members = jax.vmap(project, in_axes=(None, 0))(placed[0], jnp.stack([placed[1]] * 2))
    assert_close(jax.device_get(members[1]), jax.device_get(got))
