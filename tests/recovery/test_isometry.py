import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import recovery


M, N = 2000, 14


@pytest.fixture(scope="module")
def operator():
    return jax.jit(lambda k: lrjax.matrix_sensing(k, (N, N), 2, M).operator)(jr.key(0))


@pytest.mark.slow
def test_mixed_norm_of_gaussian_measurements(operator):
    """Mean sqrt(2/π) and standard deviation 0.6028/√m a measurement of unit variance."""
    rip = recovery.mixed_norm_rip(operator, 4, key=jr.key(1), trials=100)
    scale = M**0.5  # the sum of m measurements of standard deviation 1/√m
    assert (
        abs(float(rip.mean) / scale - (2 / np.pi) ** 0.5) < 4 * 0.6028 / M**0.5 / 200**0.5
    )
    assert abs(float(rip.std) / 0.6028 - 1) < 0.2  # four standard errors of 200 draws
    assert rip.lower < rip.mean < rip.upper
    assert float(rip.sharpness) == pytest.approx(float(rip.lower))


@pytest.mark.slow
def test_outliers_lower_the_sharpness(operator):
    """Around (1 − 2p) of the mean; no recovery from half of them."""
    for share in (0.1, 0.3, 0.5):
        wrong = jnp.arange(M) < share * M
        rip = recovery.mixed_norm_rip(operator, 4, key=jr.key(1), trials=50, outliers=wrong)
        spread = 4 * 0.6028 / (rip.mean / M**0.5)  # in measurements' root count
        assert abs(float(rip.sharpness / rip.mean) - (1 - 2 * share)) < spread / M**0.5
    assert float(rip.sharpness) < 0.05 * float(rip.mean)


@pytest.mark.slow
def test_sign_rip_falls_with_the_number_of_measurements():
    """The direction of the subgradient, and 1/√m for its deviation; outliers change φ."""
    deviations = []
    for count in (500, 2000):
        operator = lrjax.matrix_sensing(jr.key(0), (9, 9), 2, count).operator
        rip = recovery.sign_rip(operator, 2, key=jr.key(2), trials=10)
        assert abs(float(rip.scale) / (2 * count / np.pi) ** 0.5 - 1) < 0.05
        deviations.append(float(rip.deviation))
    assert 1.6 < deviations[0] / deviations[1] < 2.5
    hit = jr.bernoulli(jr.key(3), 0.2, (2000,)) * 1e3
    wrong = recovery.sign_rip(operator, 2, key=jr.key(2), trials=10, corruption=hit)
    # An outlier of one sign drowns its measurement: 80 % of the scale are left.
    assert abs(float(wrong.scale / rip.scale) - 0.8) < 0.05


def test_bad_counts_are_refused(operator):
    with pytest.raises(ValueError, match="trials"):
        recovery.mixed_norm_rip(operator, 2, key=jr.key(0), trials=0)
