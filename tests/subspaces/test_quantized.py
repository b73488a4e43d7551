"""Moments and bases at few bits a number: what is kept, what is lost, what it costs."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lrjax
from lrjax import subspaces as sub
from lrjax._codes import dither, quantize_like

from ..helpers import assert_close, relative_error


anything = lambda path, shape: len(shape) >= 2
SPACING = {True: 10 ** (5 / 127) - 1, False: 10 ** (7 / 255) - 1}  # of neighboring codes


def moments(key, shape, signed, decades):
    """Magnitudes spread evenly over the decades below one."""
    size = 10 ** -(decades * jr.uniform(key, shape))
    return size * jnp.where(jr.bernoulli(key, 0.5, shape), 1, -1) if signed else size


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("signed", [True, False])
def test_a_round_trip_keeps_the_relative_precision(signed, getkey):
    shapes = [(700,), (300, 5), (2, 7, 6)]  # blocks along rows, columns, of a stack
    xs = [moments(getkey(), shape, signed, 4.5) for shape in shapes]

    @jax.jit
    def store(x):
        codes = sub.quantize(x, signed=signed)
        nearest = sub.dequantize(codes)
        dithered = sub.dequantize(sub.quantize(x, signed=signed, step=jnp.array(3)))
        return codes, nearest, dithered, quantize_like(nearest, codes)

    for x in xs:
        codes, nearest, dithered, again = store(x)
        assert codes.codes.shape == x.shape
        assert codes.codes.dtype == (jnp.int8 if signed else jnp.uint8)
        limit = SPACING[signed] * (1 + 1e-4)
        assert jnp.max(jnp.abs(nearest / x - 1)) <= limit / 2
        assert jnp.max(jnp.abs(dithered / x - 1)) <= limit
        # The largest of a block is kept as it is; what was stored is stored as it was.
        assert jnp.max(jnp.abs(nearest)) == jnp.max(jnp.abs(x))
        assert_close(again, codes)


@pytest.mark.parametrize("signed", [True, False])
def test_dithered_codes_are_right_on_average(signed, getkey):
    x = moments(getkey(), (40, 6), signed, 4)
    steps = 512
    store = jax.jit(lambda t: sub.dequantize(sub.quantize(x, signed=signed, step=t)))
    mean = jnp.mean(jax.vmap(store)(jnp.arange(steps)), axis=0)
    # The discrepancy of the golden ratio's multiples is below (3 + log₂ t)/t.
    bound = SPACING[signed] * (3 + 9) / steps
    assert jnp.max(jnp.abs(mean / x - 1)) < bound
    assert jnp.max(jnp.abs(store(jnp.array(0)) / x - 1)) > 10 * bound
    assert 0 <= jnp.min(dither(jnp.array(7), (99, 8))) < 1


def test_second_moments_never_vanish():
    @jax.jit
    def both(x):
        unsigned = sub.dequantize(sub.quantize(x, signed=False))
        return unsigned, sub.dequantize(sub.quantize(x, signed=True, step=jnp.array(1)))

    kept, first = both(jnp.array([1.0, 1e-12, 0.0, 1e-37]))
    assert kept[0] == 1
    assert kept[2] == 0
    assert_close(kept[jnp.array([1, 3])], jnp.full(2, 10 ** (-7 * 254 / 255)), rtol=1e-5)
    assert_close(first, jnp.array([1.0, 0.0, 0.0, 0.0]))
    assert not any(x.any() for x in both(jnp.zeros(4)))


@pytest.mark.slow
def test_slow_averages_decay_between_their_codes():
    """Rounded to the nearest, a decay of 0.1 % a step would never reach the next code."""
    start = jnp.array([1.0, 0.01])
    decay = jnp.array([1.0, 0.999])

    def run(dithers):
        def step(codes, t):
            x = decay * sub.dequantize(codes)
            return sub.quantize(x, signed=False, step=t if dithers else None), None

        first = sub.quantize(start, signed=False)
        return sub.dequantize(jax.lax.scan(step, first, jnp.arange(1000))[0])

    assert_close(run(False), sub.dequantize(sub.quantize(start, signed=False)))
    got = run(True)
    assert got[0] == 1
    assert abs(jnp.log(got[1] / start[1]) / jnp.log(0.999) - 1000) < 150


@pytest.fixture(scope="module")
def pair():
    """Adam, and Adam at eight bits, on the same gradients ``(steps, m, n)``."""
    g = 1 + jr.normal(jr.key(0), (6, 40, 24))
    adam = optax.scale_by_adam()
    tx = lrjax.quantize_state(adam, block=16, min_size=1)

    @jax.jit
    def run(g):
        def step(states, g):
            a, exact = adam.update(g, states[0])
            b, coded = tx.update(g, states[1])
            return (exact, coded), (a, b)

        return jax.lax.scan(step, (adam.init(g[0]), tx.init(g[0])), g)

    return run(g)


def test_adam_at_eight_bits_takes_nearly_its_steps(pair):
    _, (want, got) = pair
    assert_close(got[0], want[0])
    worst = (1 + SPACING[True]) / (1 - SPACING[False]) ** 0.5 - 1
    assert relative_error(got[1], want[1]) < worst
    assert relative_error(got[-1], want[-1]) < 0.05  # dithering averages out


def test_a_slow_average_at_eight_bits_stays_slow():
    """The state is stored with dither: to the nearest code it would never move."""
    tx = lrjax.quantize_state(optax.trace(0.999), min_size=1)
    later = jnp.tile(jnp.array([0.001, 0.0]), (1000, 1))  # keeps the first, not the second
    gradients = jnp.concatenate([jnp.array([[1.0, 0.01]]), later])
    step = lambda state, g: tx.update(g, state)[::-1]
    run = jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])
    first, second = run(gradients)[-1]
    assert abs(first - 1) < 0.1
    assert abs(jnp.log(second / 0.01) / jnp.log(0.999) - 1000) < 200


def test_codes_take_a_byte_and_a_scale_for_each_block(pair):
    (_, state), _ = pair
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state.inner)
    assert shapes.mu.codes == ((40, 24), jnp.int8)
    assert shapes.nu.codes == ((40, 24), jnp.uint8)
    assert shapes.mu.scale == shapes.nu.scale == ((3, 24), jnp.float32)  # of 14 rows
    report = lrjax.metrics.memory_report(
        {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)},
        lrjax.quantize_state(optax.scale_by_adam()),
    )
    assert report.leaves[0].state_bytes == 2 * (512 * 1024 + 4 * 512 * 4)
    assert round(report.ratio, 3) == round((1 + 4 / 256) / 4, 3)


@pytest.mark.slow
def test_carries_see_through_codes(getkey):
    """Inside the subspace loop, where both moments turn with each new basis."""
    g = 1 + jr.normal(getkey(), (4, 6, 40))
    settings = {
        "schedule": sub.Always(),
        "carry": sub.RotateVariance(),
        "where": anything,
    }

    @jax.jit
    def run(g):
        coded = lrjax.quantize_state(optax.scale_by_adam(), min_size=1)
        out = []
        for inner in (optax.scale_by_adam(), coded):
            tx = lrjax.project_updates(inner, sub.RandomOrthonormal(5), **settings)
            step = lambda state, g, tx=tx: tx.update(g, state)[::-1]
            out.append(jax.lax.scan(step, tx.init(g[0]), g)[1])
        return out

    want, got = run(g)
    assert relative_error(got, want) < 0.1
    assert relative_error(got, want) > 0


@pytest.mark.slow
def test_a_whole_recipe_at_eight_bits_still_descends(getkey):
    target = jr.normal(getkey(), (32, 48))

    def train(tx):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(w - target, state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.zeros_like(target)
        (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), length=100)
        return jnp.linalg.norm(w - target) / jnp.linalg.norm(target), state

    plain = lrjax.subspace_adam(0.05, 8, where=anything)
    coded = lrjax.quantize_state(plain, min_size=1)
    (want, _), (got, state) = jax.jit(lambda: (train(plain), train(coded)))()
    assert got < 1.2 * want < 0.5
    assert state.inner[0].inner.mu.codes.dtype == jnp.int8


def test_small_moments_stay_and_unknown_ones_are_named(without_type_checks):
    params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64), "s": jnp.zeros(())}
    shapes = lambda inner: jax.eval_shape(lrjax.quantize_state(inner).init, params)
    state = shapes(optax.scale_by_adam())
    assert state.inner.mu.codes["w"].dtype == jnp.int8
    assert state.inner.mu.scale["w"].shape == (64, 1)
    assert state.inner.nu.codes["b"].dtype == jnp.float32
    assert state.inner.nu.scale["b"] == optax.MaskedNode()
    dion = shapes(lrjax.dion(0.1, 4))
    assert dion.inner[0][0].buffer.codes["w"].dtype == jnp.int8
    with pytest.raises(ValueError, match=r"knows no moments.*EmptyState.*register_moments"):
        shapes(optax.sgd(0.1))
    with pytest.raises(ValueError, match="basis matrix itself"):
        sub.Quantized(sub.Gaussian(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis_type", "spec", "bits"),
    [
        (AxisType.Auto, P("x", None), 8),
        (AxisType.Explicit, P(None, "x"), 8),
        (AxisType.Auto, P("x", None), 4),
        (AxisType.Explicit, P(None, "x"), 4),
    ],
    ids=["auto", "explicit", "auto-4", "explicit-4"],
)
def test_codes_are_sharded_like_their_moments(axis_type, spec, bits):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    g = 1 + jr.normal(jr.key(0), (16, 64))
    tx = lrjax.quantize_state(optax.scale_by_adam(), block=8, min_size=1, bits=bits)
    two = jax.jit(lambda g: tx.update(g, tx.update(g, tx.init(g))[1]))
    want, _ = two(g)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(g, NamedSharding(mesh, spec))
        compiled = two.lower(sharded).compile()
        got, state = compiled(sharded)
    assert_close(jax.device_get(got), want)
    held = state.inner.mu.codes
    assert held.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), [(4, 10), (8, 64)])
def test_a_basis_is_stored_to_half_a_step(bits, group, getkey):
    a = jr.normal(getkey(), (2, 13, 20))
    basis = sub.Quantized(sub.GramEigh(3), bits, group)
    to = sub.RefreshContext(getkey(), jnp.array(0), None, 3)
    state = basis.refresh(basis.init(a.shape, 3, a.dtype, getkey()), a, to)
    p = sub.GramEigh(3).refresh(None, a, to)
    stored = basis.projector(state, to.key, 13, 3, True).matrix
    entry = jnp.arange(39) // min(group, 40)
    step = state.scale[:, entry].reshape(2, 13, 3)
    assert jnp.all(jnp.abs(stored - p) <= 0.5 * step * (1 + 1e-4))
    assert state.codes.shape == (2, -(-39 // min(group, 40)), min(group, 40) * bits // 8)
    assert basis.orthonormal == (bits == 8)
