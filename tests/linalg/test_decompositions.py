"""The SVD for TPU, which runs everywhere, against LAPACK's; and the two that are chosen."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.linalg.decompositions.svd_and_eigh import svd_by_polar
from tests.helpers import assert_close


SPECTRA = {
    "flat": lambda k: np.ones(k),
    "steep": lambda k: np.logspace(0, -12, k),
    "low rank": lambda k: np.where(np.arange(k) < 3, 1.0, 0.0),
    "nothing": lambda k: np.zeros(k),
    "huge": lambda k: np.linspace(2e30, 1e30, k),
}


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(11, 11), (17, 6), (6, 17)], ids=str)
def test_svd_by_polar_is_an_svd(getkey, spectrum, shape):
    """Backward stable: all errors are of rounding size over the largest value."""
    k = min(shape)
    draw = lambda n: jnp.linalg.qr(jr.normal(getkey(), (2, n, k)))[0]
    values = jnp.array(SPECTRA[spectrum](k), jnp.float32)
    x = jnp.einsum("bik,k,bjk->bij", draw(shape[0]), values, draw(shape[1]))
    u, s, vt = jax.jit(svd_by_polar)(x)
    unit = x / jnp.maximum(values[0], 1)
    s = s / jnp.maximum(values[0], 1)
    want = jnp.linalg.svd(unit, compute_uv=False)
    assert_close(s, want, condition=30)
    assert_close(jnp.einsum("bik,bk,bkj->bij", u, s, vt), unit, condition=100)
    eye = jnp.broadcast_to(jnp.eye(k), (2, k, k))
    assert_close(u.mT @ u, eye, condition=100)
    assert_close(vt @ vt.mT, eye, condition=100)


def test_on_this_platform_they_are_lapack(getkey):
    x = jr.normal(getkey(), (3, 7, 5))
    for got, want in zip(
        lrjax.linalg.svd(x), jnp.linalg.svd(x, full_matrices=False), strict=True
    ):
        assert_close(got, want)
    alone = jnp.linalg.svd(x, compute_uv=False)
    assert_close(lrjax.linalg.singular_values(x), alone)
    g = x.mT @ x
    for got, want in zip(lrjax.linalg.eigh(g), jnp.linalg.eigh(g), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(
    "function",
    [lrjax.linalg.svd, lrjax.linalg.singular_values, lrjax.metrics.stable_rank],
    ids=lambda f: f.__name__,
)
def test_on_tpu_there_is_no_other_decomposition(function):
    """Exported for a TPU, the program holds Jacobi's eigendecomposition alone."""
    x = jax.ShapeDtypeStruct((40, 30), jnp.float32)
    text = jax.export.export(jax.jit(function), platforms=["tpu"])(x).mlir_module()
    assert "Eigh" in text
    assert "Qr" not in text
    assert "householder" not in text.lower()
