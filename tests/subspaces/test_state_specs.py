"""Where the state of an optimizer lies on a mesh, told beforehand and kept by steps."""

import contextlib
import re
from collections import Counter

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax

from ..helpers import assert_close


SHAPES = {"wide": (16, 32), "tall": (32, 16), "stack": (4, 8, 12), "bias": (8,)}
SPECS = {"wide": P("x", None), "tall": P("x", "y"), "stack": P("x"), "bias": P("y")}
OPTIMIZERS = {
    "subspace_adam": lambda: lrjax.subspace_adam(1e-2, 4, blocks=2),
    "galore": lambda: lrjax.galore(1e-2, 4, refresh_every=2),
    "adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
}
LEAVES = {
    "subspace_adam": ("tall", "stack"),
    "galore": ("wide", "bias"),
    "adam": ("wide", "tall", "stack", "bias"),
}


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def tree(seed, names=tuple(SHAPES)):
    return {n: jr.normal(jr.key(seed), SHAPES[n]) for n in names}


def stepper(tx):
    @jax.jit
    def step(state, grads):
        updates, state = tx.update(grads, state, grads)
        return updates, state

    return step


@pytest.fixture(scope="module")
def alone():
    """Two steps of every optimizer on one device."""
    out = {}
    for name, make in OPTIMIZERS.items():
        tx, names = make(), LEAVES[name]
        step = stepper(tx)
        _, state = step(jax.jit(tx.init)(tree(0, names)), tree(1, names))
        out[name], _ = step(state, tree(2, names))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_placed_by_its_specs_stays_there(name, axis_type, alone):
    tx, on = OPTIMIZERS[name](), mesh(axis_type)
    by_spec = {n: NamedSharding(on, SPECS[n]) for n in LEAVES[name]}
    put = lambda seed: jax.device_put(tree(seed, LEAVES[name]), by_spec)
    with jax.set_mesh(on):
        specs = lrjax.state_specs(tx, put(0), by_spec)
        if axis_type is AxisType.Auto:
            state = jax.jit(tx.init, out_shardings=specs)(put(0))
            step = jax.jit(stepper(tx), out_shardings=(by_spec, specs))
        else:
            state, step = jax.jit(tx.init)(put(0)), stepper(tx)
        _, state = step(state, put(1))
        updates, state = step(state, put(2))

    def check(x, sharding):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)

    jax.tree.map(check, state, specs)
    jax.tree.map(check, updates, by_spec)
    assert_close(jax.device_get(updates), jax.device_get(alone[name]), condition=1e3)


@pytest.mark.slow_but("adam-False")
@pytest.mark.parametrize(
    ("name", "is_set"), [("subspace_adam", True), ("galore", False), ("adam", False)]
)
def test_on_mesh_places_states_by_itself(name, is_set, alone):
    on = mesh(AxisType.Auto)
    by_spec = {n: NamedSharding(on, SPECS[n]) for n in LEAVES[name]}
    put = lambda seed: jax.device_put(tree(seed, LEAVES[name]), by_spec)
    tx = lrjax.on_mesh(OPTIMIZERS[name](), by_spec)
    with jax.set_mesh(on) if is_set else contextlib.nullcontext():
        specs = lrjax.state_specs(OPTIMIZERS[name](), put(0), by_spec)
        state, step = tx.init(put(0)), stepper(tx)
        types = jax.tree.map(jax.typeof, state)
        _, state = step(state, put(1))
        updates, state = step(state, put(2))
    assert jax.tree.map(jax.typeof, state) == types
    for x, sharding in zip(
        jax.tree.leaves((state, updates)), jax.tree.leaves((specs, by_spec)), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
    assert_close(jax.device_get(updates), jax.device_get(alone[name]), condition=1e3)


@pytest.mark.slow
def test_on_mesh_sends_what_an_explicit_mesh_sends():
    def sent(axis_type, wrap):
        by_spec = {"tall": NamedSharding(mesh(axis_type), SPECS["tall"])}
        put = jax.device_put({"tall": jnp.ones((32, 16))}, by_spec)
        tx = wrap(OPTIMIZERS["subspace_adam"](), by_spec)
        text = stepper(tx).lower(tx.init(put), put).compile().as_text() or ""
        kinds = r"all-\w+|collective-permute|reduce-scatter"
        return Counter(re.findall(rf"= (\S+) ({kinds})\(", text))

    explicit = sent(AxisType.Explicit, lambda tx, specs: tx)
    assert sent(AxisType.Auto, lrjax.on_mesh) == explicit
    assert explicit


def test_on_mesh_moves_further_arguments_too():
    on = NamedSharding(mesh(AxisType.Auto), P("x"))
    params = jax.device_put(tree(0, ("wide",)), on)
    alone = optax.with_extra_args_support(lrjax.scale_by_polyak(0.0))
    wanted = jax.device_get(params)
    want, _ = alone.update(wanted, alone.init(wanted), wanted, value=0.5, grad=wanted)
    tx = lrjax.on_mesh(alone, on)
    got, _ = tx.update(params, tx.init(params), params, value=jnp.float32(0.5), grad=params)
    assert_close(jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (lambda: P("x"), "on 0 meshes"),
        (lambda: {}, "got none"),
        (lambda: NamedSharding(mesh(AxisType.Explicit), P("x")), "needs no wrapper"),
    ],
    ids=["spec", "empty", "explicit"],
)
def test_on_mesh_takes_one_auto_mesh(specs, words):
    with pytest.raises(ValueError, match=words):
        lrjax.on_mesh(optax.adam(1e-3), specs())


def test_whatever_side_is_projected_all_of_the_state_is_cut():
    tx = lrjax.project_updates(optax.scale_by_adam(), lrjax.subspaces.Power(4))
    with jax.set_mesh(mesh(AxisType.Auto)):
        state = lrjax.state_specs(tx, tree(0), SPECS)
    both = P(("x", "y"), None)  # rows of "tall" are cut by x, its columns by y
    bases = {"wide": P("x", None), "tall": both, "stack": P("x", None, None)}
    assert state.basis == {**bases, "bias": optax.MaskedNode()}
    moments = {"wide": P(None, "x"), "tall": both, "stack": P("x", None, None)}
    assert state.inner.mu == {**moments, "bias": P("y")}
    assert state.waiting["stack"] == P("x")
    assert state.count == P()


def test_specs_may_be_a_prefix_and_leaves_may_be_missing():
    params = {"a": {"w": jnp.zeros((8, 16)), "none": None}, "b": jnp.zeros((8,))}
    with jax.set_mesh(mesh(AxisType.Explicit)):
        state = lrjax.state_specs(optax.trace(0.9), params, {"a": P("x", None), "b": None})
    assert state.trace == {"a": {"w": P("x", None), "none": None}, "b": P(None)}


def test_a_spec_needs_a_mesh():
    with pytest.raises(ValueError, match="set_mesh"):
        lrjax.state_specs(optax.adam(1e-3), tree(0), SPECS)
    apart = NamedSharding(mesh(AxisType.Auto), P())
    with pytest.raises(ValueError, match="alike"):
        lrjax.state_specs(optax.adam(1e-3), tree(0), {**SPECS, "bias": apart})
