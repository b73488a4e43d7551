"""``fit(a X + c) = a fit(X) + c``: units and origins of data are nobody's business."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import lowrank, recovery
from tests.test_names import PUBLIC


EPS = float(jnp.finfo(jnp.float32).eps)
SHAPE, RANK = (48, 40), 3
SEEN = jr.bernoulli(jr.key(0), 0.6, SHAPE)
ROWS, COLUMNS = (jnp.asarray(x) for x in np.nonzero(np.asarray(SEEN)))
SIDES = (16, 14, 12)
SEEN_TENSOR = jr.bernoulli(jr.key(1), 0.6, SIDES)


def matrix(key):
    x = lowrank.gaussian_init(SHAPE, RANK, 1.0, key=key).materialize()
    return x / jnp.std(x)


def tensor(key):
    keys, shapes = jr.split(key, 4), ((4, 2), *((n, 2) for n in SIDES))
    core, *factors = (jr.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    x = lowrank.TuckerForm(core.reshape(2, 2, 2), factors).materialize()
    return x / jnp.std(x)


def with_errors(x):
    """A few entries that are far off, by eight standard deviations in units of 1."""
    return 8.0 * jr.bernoulli(jr.key(2), 0.05, x.shape)


class Case(NamedTuple):
    """How data are made and fitted, and how much of a center is lost to rounding.

    ``slack`` is in units of the rounding of the data, and ``farthest`` the center up to
    which the error keeps within it. What has a center of its own does not count it in its
    ``ranks``. To ``fit_robust_pca`` it is one more direction, found to a tolerance relative
    to all of the data.
    """

    draw: Callable
    fit: Callable
    slack: float
    farthest: float
    gross: bool = False
    ranks: int | None = None


def completed(**options):
    @jax.jit
    def fit(x):
        values = x[ROWS, COLUMNS]
        return lrjax.fit_completion(ROWS, COLUMNS, values, SHAPE, rank=6, **options)

    return fit


FITS = {
    "fit_completion": [
        Case(matrix, completed(**options), 0.8, 1000.0, ranks=RANK)
        for options in (
            {},
            {"robust": True},
            {"effects": "rows"},
            {"effects": "cols"},
            {"units": "columns"},
        )
    ],
    "fit_robust_pca": [
        Case(matrix, jax.jit(lrjax.fit_robust_pca), 40, 1000.0),
        Case(matrix, jax.jit(lrjax.fit_robust_pca), 40, 1000.0, gross=True),
    ],
    "fit_robust_tensor": [
        Case(tensor, jax.jit(recovery.fit_robust_tensor), 5, 1000.0, gross=True, ranks=2)
    ],
    "fit_tensor_completion": [
        Case(
            tensor,
            jax.jit(lambda x: recovery.fit_tensor_completion(x, mask=SEEN_TENSOR)),
            5,
            1000.0,
            ranks=2,
        )
    ],
}
CASES = [
    pytest.param(c, id=f"{name}-{k}") for name in FITS for k, c in enumerate(FITS[name])
]


def test_every_fit_is_asked():
    public = {name.split(".")[-1] for name in PUBLIC if name.startswith("recovery.fit_")}
    assert public == set(FITS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_units_and_origin_of_the_data_are_those_of_the_fit(case, getkey):
    x = np.asarray(case.draw(getkey()), float)
    off = np.asarray(with_errors(x)) if case.gross else 0.0
    for factor, center in ((1.0, 0.0), (-1e-3, 1.0), (1e4, -0.03), (-7.0, 0.3)):
        shift = center * case.farthest
        found = case.fit(jnp.asarray(factor * (x + shift + off), jnp.float32))
        # In double precision: what is rounded are the data and the fit alone.
        away = np.asarray(found.low_rank.materialize(), float) / factor - shift - x
        error = np.sqrt(np.mean(away**2))
        assert error < 2e-5 + case.slack * EPS * abs(shift)
        if case.ranks is not None:
            ranks = found.ranks if isinstance(found, recovery.TensorFit) else found.rank
            assert np.all(ranks == case.ranks)
