"""What every recipe keeps for one matrix, by shape alone, against its formula."""

import jax
import jax.numpy as jnp
import pytest

import lrjax


S, L, R = 16, 24, 4  # short side, long side, rank
BASIS, MOMENTS = S * R, 2 * L * R
NORM = EPOCH = COUNT = 1
SPARSE = 2 * round(0.01 * S * L)
SCHEDULE = 8  # of Q-GaLore: a gap, a step, a counter and five overlaps
GALORE = BASIS + MOMENTS

NUMBERS = {
    "galore": GALORE,
    "golore": GALORE,
    "sara": GALORE,
    "frugal": GALORE,
    "coap": GALORE,
    "subtrack": GALORE + NORM,
    "fira": GALORE + NORM,
    "subspace_adam": GALORE + NORM,
    "grass": MOMENTS + R,
    "galore_plus": GALORE + SPARSE + COUNT,
    "online_subspace_descent": GALORE + 2 * BASIS + COUNT,
    "ldadam": GALORE + S * L,
    "apollo": MOMENTS + EPOCH + NORM,
    "sumo": BASIS + L * R + NORM,
    "snsm": BASIS + L * R + L,
}


def state_bytes(tx, shape):
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    report = lrjax.metrics.memory_report(params, tx)
    assert report.shared_bytes <= 12  # counters
    return report.leaves[0].state_bytes


@pytest.mark.parametrize("name", NUMBERS)
def test_four_bytes_a_number(name):
    for shape in ((S, L), (L, S)):
        got = state_bytes(getattr(lrjax, name)(1.0, R), shape)
        # Whether the basis has seen a gradient, and whether a refresh waits for one.
        flags = got % 4
        assert got - flags == 4 * NUMBERS[name]
        assert flags <= 2


def test_of_those_without_a_basis():
    assert state_bytes(lrjax.adam_sn(1.0), (S, L)) == 4 * (S * L + L)
    # Adafactor's second moments are a row and a column, and one number that stays unused.
    flora = state_bytes(lrjax.flora(1.0, R), (128, 256))
    assert flora == 4 * (256 * R + 128 + 256 + 1 + EPOCH) + 1


@pytest.mark.parametrize("shape", [(S, L), (L, S)])
def test_q_galore_takes_half_a_byte_and_one_byte(shape):
    got = state_bytes(lrjax.q_galore(1.0, R, block=12, min_size=1), shape)
    basis = S * R // 2 + (S * R // 2) % 2 + 8 * -(-S * R // 12)
    padding = (-S * R) % 12 // 2
    moments = 2 * (L * R + 4 * R * (L // 12))
    assert got == basis + padding + moments + 4 * SCHEDULE + 1


def test_quantized_moments_of_any_recipe():
    tx = lrjax.quantize_state(lrjax.subspace_adam(1.0, R), block=12, min_size=1)
    moments = 2 * (L * R + 4 * R * (L // 12))
    assert state_bytes(tx, (S, L)) == 4 * (BASIS + NORM) + moments
