import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import polar
from lrjax.linalg.decompositions.polar import NEWTON_SCHULZ
from tests.helpers import assert_close, relative_error, with_spectrum
from tests.linalg.test_gram import matrices, normal


jitted = jax.jit(polar, static_argnames="method")


def scalar(method, sigma):
    """What a Newton-Schulz method maps a singular value to."""
    for a, b, c in NEWTON_SCHULZ[method]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (8, 8)])
@pytest.mark.parametrize(
    ("method", "error"),
    [("svd", 1e-13), ("gram", 1e-11), ("polar_express", 1e-8), ("cubic", 1e-6)],
)
def test_equals_uv(getkey, x64, shape, method, error):
    x = with_spectrum(getkey(), *shape, jnp.geomspace(1, 1e-2, 8), jnp.float64)
    u, _, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    assert relative_error(polar(x, method=method), u @ vt) < error


def test_muon_lands_in_its_band():
    sigma = np.geomspace(1e-2, 1, 2000)
    image = scalar("muon", sigma)
    assert image.min() > 0.67
    assert image.max() < 1.21


def test_polar_express_is_the_minimax_composition():
    """Each polynomial equioscillates on the interval that the ones before map to."""
    lower, upper = 1e-3, 1.0
    for a, b, c in NEWTON_SCHULZ["polar_express"][:5]:
        x = np.linspace(lower, upper, 400_001)
        error = a * x + b * x**3 + c * x**5 - 1
        size = np.abs(error).max()
        extremes = error[np.abs(error) > size * (1 - 1e-5)]
        signs = np.sign(extremes)
        assert (np.diff(signs) != 0).sum() == 3  # four alternations: the best quintic
        lower, upper = 1 - size, 1 + size
    assert abs(scalar("polar_express", np.geomspace(1e-3, 1, 5000)) - 1).max() < 1e-9


@pytest.mark.parametrize("method", ["svd", "gram", "muon", "polar_express", "cubic"])
def test_finite_and_bounded_for_every_matrix(getkey, method):
    for name, x in matrices(getkey).items():
        p = np.asarray(jitted(x, method=method))
        assert np.all(np.isfinite(p)), name
        assert np.linalg.norm(p, ord=2) < 1.3, name


@pytest.mark.parametrize("method", ["svd", "gram", "muon", "polar_express", "cubic"])
def test_scale_orthogonal_and_transpose_equivariance(getkey, method):
    x = normal(getkey, 12, 5)
    q = np.linalg.qr(normal(getkey, 5, 5))[0]
    p = np.asarray(jitted(x, method=method))
    assert_close(jitted(7 * x, method=method), p, condition=100)
    assert_close(jitted(x @ q, method=method), p @ q, condition=100)
    assert_close(jitted(x.T, method=method), p.T)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_runs_in_float32(getkey, dtype):
    x = jr.normal(getkey(), (2, 12, 5)).astype(dtype)
    p = polar(x, method="polar_express")
    assert p.dtype == dtype
    full = polar(x.astype(jnp.float32), method="svd")
    assert relative_error(p, full) < 2 * float(jnp.finfo(dtype).eps)


def test_steps_cut_or_repeat_the_polynomials(getkey):
    x = jr.normal(getkey(), (12, 5))
    assert_close(polar(x, method="muon", steps=5), polar(x, method="muon"))
    assert relative_error(polar(x, method="cubic", steps=30), polar(x)) < 1e-5


def test_more_steps_of_polar_express_are_exact_to_rounding(getkey, x64):
    """The polynomial that is repeated is the last one, which converges by itself."""
    x = with_spectrum(getkey(), 20, 8, jnp.geomspace(1, 1e-4, 8), jnp.float64)
    error = lambda **steps: relative_error(
        polar(x, method="polar_express", **steps), polar(x)
    )
    assert error(steps=12) < 1e-12
    assert error() > 1e-3


def test_refusals():
    with pytest.raises(ValueError, match="not iterative"):
        polar(jnp.eye(2), method="svd", steps=3)
