"""Moments at four bits a number: powers of two, two to a byte."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import subspaces as sub

from ..helpers import assert_close, relative_error
from ..reference import eight_bits, projected_adam as ref


LOWEST = {True: 2.0**-6, False: 2.0**-15}  # the smallest magnitude
both = pytest.mark.parametrize("signed", [True, False])


def store(x, signed, step=None, block=256):
    return sub.quantize(x, signed=signed, bits=4, step=step, block=block)


def signs(key, x, signed):
    return x * jnp.where(jr.bernoulli(key, 0.5, x.shape), 1, -1) if signed else x


@pytest.mark.slow_but("True")
@both
def test_powers_of_two_are_kept_as_they_are(signed, getkey):
    """All pairs of neighbors in a byte, of either sign, and zero where there is one."""
    magnitudes = 2.0 ** -jnp.arange(7 if signed else 16)
    values = jnp.concatenate([magnitudes, -magnitudes, jnp.zeros(1)])
    values = values if signed else magnitudes
    pairs = jnp.stack(jnp.meshgrid(values, values), axis=-1).reshape(1, -1)
    scale = 2.0 ** jr.randint(getkey(), (), -20, 20).astype(jnp.float32)

    @jax.jit
    def there_and_back(x):
        kept = store(x, signed, step=jnp.array(5))
        return kept, sub.dequantize(kept)

    kept, again = there_and_back(scale * pairs)
    assert_close(again, scale * pairs, rtol=1e-6)
    assert kept.codes.shape == (1, pairs.size // 2)
    assert kept.codes.dtype == (jnp.int8 if signed else jnp.uint8)
    assert len(np.unique(kept.codes)) == (225 if signed else 256)


@pytest.mark.slow
@both
def test_a_round_trip_is_within_one_power_of_two(signed, getkey):
    for shape in ((700,), (300, 4), (2, 7, 6)):  # blocks along rows, columns, of a stack
        x = LOWEST[signed] ** jr.uniform(getkey(), shape)
        x = signs(getkey(), x, signed)
        nearest = sub.dequantize(store(x, signed))
        dithered = sub.dequantize(store(x, signed, step=jnp.array(3)))
        limit = (1 + 1e-5) * jnp.abs(x)
        # Between a and 2a nothing is further than a/2 from the nearest of both; nor
        # below the smallest magnitude of a smaller block, to which a scale is no 1.
        small = jnp.abs(x) < LOWEST[signed] * jnp.max(jnp.abs(x))
        assert jnp.all((jnp.abs(nearest - x) <= limit / 2) | small)
        assert jnp.all((jnp.abs(dithered - x) <= limit) | small)
        assert jnp.max(jnp.abs(nearest)) == jnp.max(jnp.abs(x))
        assert_close(sub.dequantize(store(nearest, signed)), nearest, rtol=0)


@pytest.mark.slow_but("False")
@both
def test_dithered_codes_are_right_on_average(signed, getkey):
    x = signs(getkey(), LOWEST[signed] ** (0.9 * jr.uniform(getkey(), (40, 6))), signed)
    x = x.at[:, 0].set(1.0)  # the scale of each block: rows are the shorter axis
    steps = 512
    stored = jax.jit(lambda t: sub.dequantize(store(x, signed, step=t, block=1)))
    whole = jax.jit(lambda t: sub.dequantize(store(x.T, signed, step=t)).T)
    for at in (stored, whole):
        mean = jnp.mean(jax.vmap(at)(jnp.arange(steps)), axis=0)
        # The discrepancy of the golden ratio's multiples is below (3 + log₂ t)/t.
        assert jnp.max(jnp.abs(mean / x - 1)) < (3 + 9) / steps


@pytest.mark.slow
def test_second_moments_have_no_zero():
    x = jnp.array([1.0, 1e-12, 0.0, 2.0**-16])
    assert_close(
        sub.dequantize(store(x, False)), jnp.array([1.0, *[2.0**-15] * 3]), rtol=1e-6
    )
    assert not sub.dequantize(store(jnp.zeros(4), False)).any()  # an empty block is empty
    first = sub.dequantize(store(-x, True, step=jnp.array(1)))
    assert_close(first, jnp.array([-1.0, 0.0, 0.0, 0.0]), rtol=0)


@pytest.mark.slow_but("shape0")
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_adam_at_four_bits_is_that_of_the_reference(shape, x64):
    rng = np.random.default_rng(3)
    grads = rng.normal(size=shape) + rng.normal(size=(20, *shape))
    numbers = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
    tx = lrjax.quantize_state(optax.scale_by_adam(**numbers), bits=4, block=5, min_size=1)
    step = lambda state, g: tx.update(g, state)[::-1]
    run = jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])

    def stored(moment, signed, t):
        return eight_bits.stored(moment, signed, 5, t, bits=4)

    want = ref.stored_adam(grads, store=stored, **numbers)
    assert_close(run(jnp.asarray(grads)), want, rtol=1e-9)


def test_a_slow_average_at_four_bits_stays_slow():
    """The mean over sixty-four of them: one alone goes from power to power by chance."""
    tx = lrjax.quantize_state(optax.trace(0.999), min_size=1, bits=4)
    first = jnp.full((1, 64), 0.4).at[:, 0].set(1.0)
    later = jnp.tile(jnp.zeros((1, 64)).at[:, 0].set(0.001), (300, 1))
    step = lambda state, g: tx.update(g[None], state)[::-1]
    run = jax.jit(lambda g: jax.lax.scan(step, tx.init(g[:1]), g)[1])
    last = run(jnp.concatenate([first, later]))[-1, 0]
    assert abs(jnp.mean(last[1:]) / 0.4 - 0.999**300) < 0.15
    assert last[0] > 0.99


def test_state_bytes_are_half_a_byte_a_number_and_the_scales():
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    reports = [
        lrjax.metrics.memory_report(
            params, lrjax.quantize_state(optax.scale_by_adam(), bits=bits)
        )
        for bits in (4, 8)
    ]
    scales = 512 * (1024 // 256) * 4
    got = [report.leaves[0].state_bytes for report in reports]
    assert got == [2 * (512 * 1024 * bits // 8 + scales) for bits in (4, 8)]


@pytest.mark.slow
def test_carries_see_through_packed_codes(getkey):
    """Inside the subspace loop, where both moments turn with each new basis."""
    g = 1 + jr.normal(getkey(), (4, 6, 40))
    settings = {"schedule": sub.Always(), "carry": sub.RotateVariance()}

    @jax.jit
    def run(g):
        out = []
        coded = lrjax.quantize_state(optax.scale_by_adam(), min_size=1, bits=4)
        for inner in (optax.scale_by_adam(), coded):
            tx = lrjax.project_updates(
                inner, sub.RandomOrthonormal(5), where=lambda *leaf: True, **settings
            )
            step = lambda state, g, tx=tx: tx.update(g, state)[::-1]
            out.append(jax.lax.scan(step, tx.init(g[0]), g))
        return out

    (_, want), (state, got) = run(g)
    assert isinstance(state.inner.inner.mu, sub.PackedQuantized)
    assert state.inner.inner.mu.codes.shape == (5, 20)
    assert 0 < relative_error(got, want) < 0.7


def test_what_does_not_pack_stays_as_it_is():
    params = {"even": jnp.zeros((64, 64)), "odd": jnp.zeros((64, 65))}
    tx = lrjax.quantize_state(optax.scale_by_adam(), bits=4)
    state = jax.eval_shape(tx.init, params)
    assert state.inner.mu.codes["even"].shape == (64, 32)
    assert state.inner.mu.codes["odd"].dtype == jnp.float32
    assert state.inner.mu.scale["odd"] == optax.MaskedNode()
    with pytest.raises(ValueError, match=r"even: got shape \(3, 5\)"):
        store(jnp.ones((3, 5)), True)


def test_other_numbers_of_bits_are_refused(without_type_checks):
    for refused in (
        lambda: lrjax.quantize_state(optax.scale_by_adam(), bits=6),
        lambda: sub.quantize(jnp.ones(4), signed=True, bits=2),
    ):
        with pytest.raises(ValueError, match=r"bits=4 or bits=8 a number, got [26]"):
            refused()
