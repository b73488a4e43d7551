"""What every kind of adapter must do, on one model with everything that breaks adapters."""

import inspect
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from lrjax.adapters import WithBias, WithMagnitude
from tests.adapters.models import (
    ZOO_PATHS,
    ZOO_SITES,
    assert_same,
    moved,
    zoo,
    zoo_axes,
    zoo_where,
)
from tests.helpers import assert_close, tol


# The annotations of each kind are checked in tests/adapters.
pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def count(of_matrix, shared=0, biases=0):
    """Trained numbers: of each matrix, of the pool and of biases."""
    return sum(k * of_matrix(m, n) for m, n, k in ZOO_SITES) + shared + biases


@eqx.filter_jit
def adapters_of(kind, key):
    data = DATA if kind is KINDS["cores"][0] else None
    where = zoo_where
    return lrjax.adapt(MODEL, kind, where=where, axes=zoo_axes, key=key, data=data)


R = 2
MODEL, TOKENS = zoo(jr.key(1)), jnp.array([1, 4, 0, 3])
lora = jax.jit(
    lambda key: lrjax.adapt(MODEL, lrjax.LoRA(R), where=zoo_where, axes=zoo_axes, key=key)
)
OLD = [lora(jr.key(i)) for i in range(2)]
DATA = {"normed.layer": MODEL.normed.layer.weight}  # in the place of a gradient
# name: the kind, and the number of parameters that its paper says.
KINDS = {
    "LoRA": (lrjax.LoRA(R), count(lambda m, n: R * (m + n))),
    "DoRA": (lrjax.DoRA(R), count(lambda m, n: R * (m + n) + m)),
    "BoRA": (room.BoRA(R), count(lambda m, n: R * (m + n) + m + n)),
    "NOLA": (room.NOLA(R, 3), count(lambda m, n: 2 * 3)),
    "LoRA-XS": (lrjax.LoRAXS(R, std=0.0), count(lambda m, n: R**2)),
    "EDoRA": (WithMagnitude(lrjax.LoRAXS(R, std=0.0)), count(lambda m, n: R**2 + m)),
    "TinyLoRA, one v": (room.TinyLoRA(R, 3, group="v"), 3),
    "LoTR": (room.LoTR(R), count(lambda m, n: R**2, shared=R * (12 + 7))),
    "VeRA": (lrjax.VeRA(5), count(lambda m, n: 5 + m)),
    "Tied-LoRA": (lrjax.TiedLoRA(R), count(lambda m, n: R + m, shared=R * (12 + 7))),
    "fLoRA": (room.FLoRA(R), count(lambda m, n: R * (m + n))),
    "biases": (WithBias(lrjax.LoRA(R)), count(lambda m, n: R * (m + n), biases=5 * 4)),
    "Full": (room.Full(), count(lambda m, n: m * n, biases=5 * 4)),
}
BOTH = lambda m, n: R * (m + n)
GATED = lambda m, n: R * (m + n) + R
NESTED = lambda m, n: 2 * R * 3
# Kinds that each meet some sites of the model, in the order of ``ZOO_SITES``.
MIXES = {
    "factors": [
        (lrjax.LoRA(R, 4.0, rank_stabilized=True), BOTH),
        (lrjax.LoRA(R, train="left"), lambda m, n: R * m),
        (lrjax.LoRA(R, 3.0, init="pissa"), BOTH),
        (room.IncreLoRA(R), GATED),
        (room.SoRA(R), GATED),
        (room.DyLoRA(R), BOTH),
        (room.AdaLoRA(R), GATED),
        (room.NLS((R, 1)), BOTH),
        (room.CapaBoost(R), BOTH),
    ],
    "structured": [
        (room.HiRA(R), BOTH),
        (room.Tucker(R), lambda m, n: R**3 + R * (2 + 2 + n)),  # two heads of size two
        (room.RandLoRA(R, R), lambda m, n: 2 * (R + 4)),  # two bases of four sides
        (room.OFT(2), lambda m, n: n // 2),
        (room.MiSS(R), lambda m, n: R * m),
        (room.IA3(), lambda m, n: m),
        (room.SODA(), lambda m, n: m + 2 * 1),  # two rotations of size two
        (room.LoKr(1), lambda m, n: 2 * 1 + 2 * 2 * 3),  # two channels, three taps
        (room.DoTA(R, cores=2), lambda m, n: 2 * 1 * R + R * 2 * n),
    ],
    "cores": [
        (room.TinyLoRA(R, 3), lambda m, n: 3),
        (room.PMSS(R), lambda m, n: R**2),
        (room.SVFit(R), lambda m, n: R),
        (room.NoRA(R, 3), NESTED),
        (room.LoLDU(R, 3.0), lambda m, n: R),
        (room.LoRASB(R, learning_rate=0.0), lambda m, n: R**2),
        (room.PoLAR(R), lambda m, n: R * (m + n + R)),
        (room.EigenLoRAx(OLD, R, components=2, random=1, spread=0.0), NESTED),
        (room.StelLA(R, core=0.0), lambda m, n: R * (m + n + R)),
    ],
}


# In tests/adapters/test_structured.py, of an adapter class that another kind brings here.
ELSEWHERE = {room.BAT, room.FusedRows, room.GraLoRA, room.LoHa, room.TokenRows}


def mixed(kinds):
    """A rule that answers with a kind for each site, and the numbers of all."""
    numbers = sum(
        k * of_matrix(m, n)
        for (m, n, k), (_, of_matrix) in zip(ZOO_SITES, kinds, strict=True)
    )
    return (lambda path, site: kinds[ZOO_PATHS.index(path)][0]), numbers


KINDS |= {name: mixed(kinds) for name, kinds in MIXES.items()}
BASES = {room.AdapterKind, WithBias, WithMagnitude}
every = pytest.mark.parametrize("name", KINDS)
PLAIN = jax.jit(lambda tokens: MODEL(tokens))


def setting(name, getkey):
    adapters = adapters_of(KINDS[name][0], getkey())
    params, frozen = lrjax.partition(adapters)
    return adapters, moved(params, getkey()), frozen


ARRAYS, REST = eqx.partition(MODEL, eqx.is_inexact_array)


def squares(output):
    return jnp.mean(output**2), output


@jax.jit
def of_dense(arrays):
    """The output of a model of these weights, and the gradient of its loss: one program."""
    loss = lambda arrays: squares(eqx.combine(arrays, REST)(TOKENS))
    (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(arrays)
    return output, gradient


def of_merged(frozen):
    """The same of a merged model and its adapters, by the chain rule."""

    @jax.jit
    def weights(params):
        merged = lrjax.merge(MODEL, eqx.combine(params, frozen))
        assert jax.tree.structure(merged) == jax.tree.structure(MODEL)
        return eqx.filter(merged, eqx.is_inexact_array)

    def f(params):
        arrays, pullback = jax.vjp(weights, params)
        output, cotangents = of_dense(arrays)
        return output, pullback(cotangents)[0]

    return f


def test_every_kind_is_here():
    public = {
        value
        for value in vars(room).values()
        if inspect.isclass(value) and issubclass(value, room.AdapterKind)
    }
    kinds = [kind for group in (KINDS.values(), *MIXES.values()) for kind, _ in group]
    here = {type(kind) for kind in kinds if isinstance(kind, room.AdapterKind)} | ELSEWHERE
    assert public - BASES == here - BASES


@pytest.mark.parametrize("name", KINDS)
def test_number_of_parameters(name, getkey):
    kind, numbers = KINDS[name]
    shapes = eqx.filter_eval_shape(adapters_of, kind, getkey())
    params, _ = lrjax.partition(shapes)
    assert sum(x.size for x in jax.tree.leaves(params)) == numbers
    assert shapes.summary().splitlines()[-1].split()[-1] == f"{numbers:,}"


def flat(tree):
    """All numbers of a tree in one vector: parts that vanish have no size of their own."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.slow_but("LoRA", "VeRA", "Full")
@every
def test_bound_is_merged_and_vmap_is_a_loop(name, getkey):
    """In value and gradient, from the start on, under jit, scan and a remat policy."""
    start, params, frozen = setting(name, getkey)
    policy = jax.checkpoint_policies.dots_saveable

    def loss(params, frozen):
        return squares(lrjax.bind(MODEL, eqx.combine(params, frozen))(TOKENS, policy))

    bound = jax.jit(jax.value_and_grad(loss, has_aux=True))
    merged = of_merged(frozen)

    begin, plain = lrjax.partition(start)[0], PLAIN(TOKENS)
    (_, output), _ = bound(begin, frozen)
    assert_close(output, plain, condition=100)
    assert_close(merged(begin)[0], plain, condition=100)

    (_, output), gradient = bound(params, frozen)
    other, same = merged(params)
    assert_close(output, other, condition=1e3)
    assert_close(flat(gradient), flat(same), condition=1e3)
    assert np.isfinite(flat(gradient)).all()
    assert all(np.any(g) for g in jax.tree.leaves(gradient)), "some numbers do nothing"
    assert np.linalg.norm(output - plain) > 1e-2

    second = moved(params, getkey())
    two = jax.tree.map(lambda a, b: np.stack([a, b]), params, second)
    (_, outputs), gradients = jax.jit(jax.vmap(bound, (0, None)))(two, frozen)
    (_, second_output), second_gradient = bound(second, frozen)
    assert_close(outputs, np.stack([output, second_output]), condition=1e3)
    for i, want in enumerate((gradient, second_gradient)):
        got = jax.tree.map(lambda x, i=i: np.asarray(x)[i], gradients)
        assert_close(flat(got), flat(want), condition=1e3)


@pytest.mark.slow_but("LoRA", "DoRA", "VeRA")
@every
def test_each_comes_out_of_a_stack_again(name, getkey):
    """To the last bit, kinds that are no plain factors with a share of one."""
    row = [eqx.combine(*setting(name, getkey)[1:]) for _ in range(2)]

    @eqx.filter_jit
    def run(row):
        many = room.stack(row, MODEL)
        base = lrjax.merge(MODEL, room.select(many, 0))
        return [room.select(many, i) for i in (1, 2)], eqx.filter(base, eqx.is_array)

    back, base = run(row)
    np.testing.assert_array_equal(flat(base), flat(eqx.filter(MODEL, eqx.is_array)))
    for got, want in zip(back, row, strict=True):
        inner = [
            own.inner if isinstance(own, room.Weighted) else own
            for own in got.layers.values()
        ]
        assert all(
            np.all(own.share == 1)
            for own in got.layers.values()
            if isinstance(own, room.Weighted)
        )
        numbers = [list(want.layers.values()), want.pools]
        np.testing.assert_array_equal(flat([inner, got.pools]), flat(numbers))


LAYERS = ("blocks", "grouped")


@eqx.filter_jit
def with_dropout(kind, key):
    return lrjax.adapt(MODEL, kind, where=list(LAYERS), key=key)


RATED = {
    "LoRA": lrjax.LoRA(R, dropout=0.5),
    "PiSSA": lrjax.LoRA(R, init="pissa", dropout=0.5),
    "DoRA": lrjax.DoRA(R, dropout=0.5),
    "LoRA-XS": lrjax.LoRAXS(R, dropout=0.5),
    "VeRA": lrjax.VeRA(R, dropout=0.5),
    "Tied-LoRA": lrjax.TiedLoRA(R, dropout=0.5),
}


@pytest.mark.slow_but("PiSSA")
@pytest.mark.parametrize("name", RATED)
def test_dropout_acts_on_the_change_alone(name, getkey):
    params, frozen = lrjax.partition(with_dropout(RATED[name], getkey()))
    adapters = eqx.combine(moved(params, getkey()), frozen)
    x = jr.normal(getkey(), (4,))
    layer = jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, MODEL.blocks)

    @eqx.filter_jit
    def outputs(adapters, keys):
        def one(key):
            bound = lrjax.bind(MODEL, adapters, key=key).blocks
            return jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, bound)(x)

        return jax.vmap(one)(keys)

    got = np.asarray(outputs(adapters, jr.split(getkey(), 2000)))
    change = np.asarray(lrjax.merge(MODEL, adapters).blocks.weight[0] - layer.weight)
    # An input is kept, with its double, or not at all: one of sixteen outputs each time.
    masks = np.array(list(itertools.product((0, 2), repeat=4)))
    possible = np.asarray(layer(x)) + (masks * np.asarray(x)) @ change.T
    distances = np.linalg.norm(got[:, None] - possible[None], axis=2)
    assert distances.min(axis=1).max() < tol(got, condition=100)
    # Each input vanishes half of the time: 2,000 draws, six standard errors.
    kept = masks[distances.argmin(axis=1)] > 0
    assert np.all(np.abs(kept.mean(axis=0) - 0.5) < 6 * 0.5 / np.sqrt(2000))


HALF = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, MODEL
)


@eqx.filter_jit
def half_adapters_of(kind, key):
    where = lambda path, layer: path in LAYERS or path == "table"
    return lrjax.adapt(HALF, kind, where=where, key=key)


@pytest.mark.slow_but("LoRA")
@every
def test_bfloat16(name, getkey):
    adapters = half_adapters_of(KINDS[name][0], getkey())
    params, frozen = lrjax.partition(adapters)
    params = moved(params, getkey())

    @jax.jit
    def run(params, frozen):
        def loss(params, attach):
            attached = attach(HALF, eqx.combine(params, frozen))
            y = attached.grouped(jax.vmap(attached.table)(TOKENS).T)
            return jnp.sum(y.astype(jnp.float32) ** 2), (y, attached.table.weight)

        return [
            jax.grad(loss, has_aux=True)(params, attach)
            for attach in (lrjax.bind, lrjax.merge)
        ]

    (grads, bound), (other, merged) = run(params, frozen)
    assert {x.dtype for x in (*bound, *merged)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, params)
    size = max(1.0, float(np.max(np.abs(np.asarray(merged[0], np.float32)))))
    gap = np.max(
        np.abs(np.asarray(bound[0], np.float32) - np.asarray(merged[0], np.float32))
    )
    assert gap < tol(*bound) * size
    assert np.isfinite(flat((grads, other)).astype(np.float32)).all()


@pytest.mark.slow
def test_all_survive_checkpoints_without_the_model(getkey, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    adapters = {name: eqx.combine(*setting(name, getkey)[1:]) for name in KINDS}
    shapes = jax.eval_shape(lambda: adapters)
    eqx.tree_serialise_leaves(tmp_path / "adapters.eqx", adapters)
    back = eqx.tree_deserialise_leaves(tmp_path / "adapters.eqx", shapes)
    assert_same(back, adapters)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", adapters)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "orbax", shapes)
    assert_same(back, adapters)
