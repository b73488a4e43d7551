"""Every transform on every layout: it runs, its state keeps its types, same numbers.

And on sharded factors: same shardings, nothing tall gathered.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax
from tests.helpers import assert_close, random_low_rank
from tests.registry import ENTRIES, PARTS, PLUGINS


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


pairs = {name: e for name, e in PARTS.items() if e.params == "pairs" and e.shards}
SPECS = lrjax.LowRank(jnp.zeros((16, 2)), jnp.zeros((24, 2)))
object.__setattr__(SPECS, "left", P("x", None))
object.__setattr__(SPECS, "right", P("y", None))


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def problem():
    params = {"w": random_low_rank(jr.key(0), 16, 24, 2)}
    grads = {"w": random_low_rank(jr.key(1), 16, 24, 2)}
    return params, grads


def put(tree, on):
    shardings = jax.tree.map(lambda spec: NamedSharding(on, spec), {"w": SPECS})
    return jax.device_put(tree, shardings)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("entry", pairs.values(), ids=pairs.keys())
def test_sharded_factors_stay_sharded(entry, axis_type):
    params, grads = problem()
    tx = entry.make()
    value = jnp.array(0.7)

    @jax.jit
    def update(grads, state, params):
        return tx.update(grads, state, params, value=value, grad=grads)

    want, _ = update(grads, tx.init(params), params)
    on = mesh(axis_type)
    grads, params = put(grads, on), put(params, on)
    with jax.set_mesh(on):
        state = tx.init(params)
        compiled = update.lower(grads, state, params).compile()
        got, _ = compiled(grads, state, params)
    assert_close(jax.device_get(got), jax.device_get(want), condition=1e3)
    for side in ("left", "right"):
        factor = getattr(got["w"], side)
        kept = NamedSharding(on, getattr(SPECS, side))
        assert factor.sharding.is_equivalent_to(kept, factor.ndim)
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text


def test_stacks_may_be_sharded_over_their_layers():
    on = mesh(AxisType.Explicit)
    params = random_low_rank(jr.key(0), 16, 24, 2, batch=(4,))
    grads = random_low_rank(jr.key(1), 16, 24, 2, batch=(4,))
    tx = lrjax.scale_by_gram(1e-3)
    want, _ = tx.update(grads, tx.init(params), params)
    by_layer = NamedSharding(on, P("x"))
    grads, params = jax.device_put((grads, params), by_layer)
    with jax.set_mesh(on):
        compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        got, _ = compiled(grads, tx.init(params), params)
    assert_close(jax.device_get(got), jax.device_get(want), condition=1e3)
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the matrix of a tree lies on eight devices."""

    spec: P
    shape: tuple[int, ...] = (16, 32)
    sides: tuple[int, ...] = (8,)

    def mesh(self, axis_type):
        names = ("x", "y")[: len(self.sides)]
        return jax.make_mesh(self.sides, names, axis_types=(axis_type,) * len(names))

    def specs(self):
        return {"w": self.spec, "bias": P()}


LAYOUTS = {
    "rows": Layout(P("x")),
    "columns": Layout(P(None, "x")),
    "tall rows": Layout(P("x"), (32, 16)),
    "2-D": Layout(P("x", "y"), sides=(4, 2)),
    "stack by layer": Layout(P("x"), (8, 16, 32)),
    "stack by rows": Layout(P(None, "x"), (8, 16, 32)),
    "stack, 2-D": Layout(P(None, "x", "y"), (8, 16, 32), (4, 2)),
    "stack by layer and columns": Layout(P("x", None, "y"), (4, 16, 32), (4, 2)),
    "replicated": Layout(P()),
}
# What is bound to the shapes of the registry's own tree.
OTHER_SHAPES = {"project_out", "scale_by_width", "Fixed"}
dense = {
    name: entry
    for name, entry in {**ENTRIES, **PLUGINS}.items()
    if entry.params in ("dense", "stack") and name not in OTHER_SHAPES
}


def run(tx, params, grads):
    """The state at first, and after a scan over the gradients, and all updates."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params, value=jnp.float32(1), grad=g)
        return (optax.apply_updates(params, updates), state), updates

    first = tx.init(params)
    (_, last), updates = jax.lax.scan(step, (params, first), grads)
    return first, last, updates


def abstract(layout, on, steps=()):
    """The tree of a layout without its numbers, or a stack of such trees."""

    def one(shape, spec):
        whole = NamedSharding(on, P(*(None for _ in steps), *spec))
        return jax.ShapeDtypeStruct((*steps, *shape), jnp.float32, sharding=whole)

    specs = layout.specs()
    return {"w": one(layout.shape, specs["w"]), "bias": one((16,), specs["bias"])}


def trimmed(spec):
    """A spec without the axes at its end that are not sharded."""
    spec = tuple(spec)
    return trimmed(spec[:-1]) if spec and spec[-1] is None else spec


def types(tree):
    """The spec of every array; that of a constant is empty."""
    spec = lambda x: () if x.sharding is None else trimmed(x.sharding.spec)
    return {jax.tree_util.keystr(path): spec(x) for path, x in tree_leaves(tree)}


def tree_leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("entry", dense.values(), ids=dense.keys())
def test_states_keep_their_types_on_explicit_meshes(entry, layout):
    # Traced alone: JAX refuses operations that mix shardings, and a scan whose carry
    # changes its type. No mesh is set, which is how jax.make_mesh leaves it.
    on = layout.mesh(AxisType.Explicit)
    tx, params = entry.make(), abstract(layout, on)
    grads = abstract(layout, on, (2,))
    first, last, updates = jax.eval_shape(lambda p, g: run(tx, p, g), params, grads)
    assert types(updates) == types(grads)
    assert types(first) == types(last)
    # What init does there is what state_specs says for an Auto mesh.
    auto = layout.mesh(AxisType.Auto)
    with jax.set_mesh(auto):
        specs = lrjax.state_specs(tx, abstract(layout, auto), layout.specs())
    leaves = jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, P))
    assert list(map(trimmed, leaves)) == list(types(first).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["subspace_adam", "galore", "dion", "apollo"])
def test_nothing_need_be_jitted_on_the_default_mesh(name):
    on = NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))
    weight = {"w": jax.device_put(jr.normal(jr.key(0), (16, 32)), on)}
    tx = getattr(lrjax, name)(1e-3, 4)
    state = tx.init(weight)
    assert len({x.sharding.mesh for x in jax.tree.leaves(state) if x.ndim > 1}) == 1
    updates, new = jax.jit(tx.update)(weight, state, weight)
    known = lambda tree: types(jax.tree.map(jax.typeof, tree))
    assert known(updates) == known(weight)
    assert known(new) == known(state)


@pytest.mark.parametrize("name", ["subspace_adam", "dion", "soap", "ldadam", "mofasgd"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["rows", "columns"])
def test_square_matrices_at_full_rank(name, spec):
    # Bases and Gram matrices then have the shape of the matrix, and lie otherwise.
    on = jax.make_mesh((8,), ("x",))
    weight = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(on, spec))
    rank = () if name == "soap" else (16,)
    tx = getattr(lrjax, name)(1e-3, *rank)
    state = jax.eval_shape(tx.init, {"w": weight})
    updates, new = jax.eval_shape(tx.update, {"w": weight}, state, {"w": weight})
    assert types(new) == types(state)
    assert types(updates) == types({"w": weight})


@pytest.mark.parametrize("spec", [P(None, "x"), P("x")], ids=["heads", "inputs"])
def test_attention_kernels_are_sharded_by_heads_or_inputs(spec):
    on = jax.make_mesh((8,), ("x",))
    kernel = jax.ShapeDtypeStruct((16, 8, 4), jnp.float32, sharding=NamedSharding(on, spec))
    params = {"query": {"kernel": kernel}}
    tx = lrjax.subspace_adam(1e-3, rank=8)
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert types(updates) == types(params)
    assert types(new) == types(state)


def test_an_axis_within_a_side_is_not_sharded():
    on = NamedSharding(jax.make_mesh((2,), ("x",)), P(None, None, "x"))
    kernel = jax.ShapeDtypeStruct((16, 8, 4), jnp.float32, sharding=on)
    with pytest.raises(ValueError, match=r"query.kernel of shape .* is sharded"):
        jax.eval_shape(lrjax.subspace_adam(1e-3, 8).init, {"query": {"kernel": kernel}})


def test_blocks_of_a_fused_projection_are_sharded_evenly():
    on = NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))
    fused = {"w": jax.ShapeDtypeStruct((96, 16), jnp.float32, sharding=on)}
    heads = lambda blocks: lambda path, shape: lrjax.MatrixSpec(blocks=blocks)
    jax.eval_shape(lrjax.subspace_adam(1e-3, 4, where=heads(8)).init, fused)
    with pytest.raises(ValueError, match="fewer blocks than there are shards"):
        jax.eval_shape(lrjax.subspace_adam(1e-3, 4, where=heads(3)).init, fused)


def agrees(entry, layout, mode, key):
    """The updates and the last state of a mesh against those of one device."""
    on = layout.mesh(AxisType.Auto if mode.startswith("Auto") else AxisType.Explicit)
    tx = entry.make()
    shapes = jax.tree.map(lambda x: x.shape, abstract(layout, on, (3,)))
    keys = dict(zip(shapes, jr.split(key), strict=True))
    grads = {name: jr.normal(keys[name], shape) for name, shape in shapes.items()}
    params = jax.tree.map(lambda g: jnp.ones(g.shape[1:]), grads)
    together = lambda p, g: run(tx, p, g)[1:]
    want = jax.jit(together)(params, grads)
    put = lambda tree, like: jax.tree.map(
        lambda x, l: jax.device_put(x, l.sharding), tree, like
    )
    there = put(params, abstract(layout, on)), put(grads, abstract(layout, on, (3,)))
    specs = jax.tree.map(lambda x: x.sharding, there[0])
    answer = None
    if mode == "Auto, in on_mesh":
        tx = lrjax.on_mesh(tx, specs)
    if mode == "Auto":
        answer = (
            lrjax.state_specs(tx, params, specs),
            jax.tree.map(lambda x: x.sharding, there[1]),
        )
    with jax.set_mesh(on) if mode == "Explicit" else contextlib.nullcontext():
        got = jax.jit(together, out_shardings=answer)(*there)
    (got, there), (want, here) = jax.device_get((got, want))
    assert_close(there, here, rtol=1e-3)
    # The signs of singular vectors are those of rounding. What hangs on them is above.
    assert_close(jax.tree.map(np.abs, got), jax.tree.map(np.abs, want), rtol=1e-3)


MODES = ("Auto", "Auto, in on_mesh", "Explicit", "Explicit without jax.set_mesh")


def cells():
    """Every transform on one layout and one mesh, so that all of these come up often."""
    for k, (name, entry) in enumerate(dense.items()):
        layout = list(LAYOUTS)[k % len(LAYOUTS)]
        mode = MODES[k % len(MODES)]
        marks = () if name == "subspace_adam" else pytest.mark.slow
        label = f"{name}-{layout}-{mode}"
        yield pytest.param(entry, LAYOUTS[layout], mode, id=label, marks=marks)


@pytest.mark.parametrize(("entry", "layout", "mode"), list(cells()))
def test_numbers_are_those_of_one_device(entry, layout, mode, getkey):
    agrees(entry, layout, mode, getkey())
