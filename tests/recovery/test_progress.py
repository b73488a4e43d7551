import re

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from numpy.testing import assert_array_equal

import lrjax
from lrjax.lowrank import TuckerForm


KEY = jr.key(0)


def matrix(key):
    return lrjax.robust_pca(key, (30, 20), 2, 0.05).targets


def table(key):
    return jnp.where(jr.bernoulli(key, 0.6, (30, 20)), matrix(key), jnp.nan)


def tensor(key):
    keys = jr.split(key, 4)
    factors = [jr.normal(k, (n, 2)) for k, n in zip(keys, (9, 8, 7), strict=False)]
    return TuckerForm(jr.normal(keys[3], (2, 2, 2)), factors).materialize()


FITS = {
    "fit_robust_pca": (lrjax.fit_robust_pca, matrix),
    "fit_completion": (lrjax.fit_completion, table),
    "fit_robust_tensor": (lrjax.recovery.fit_robust_tensor, tensor),
    "fit_tensor_completion": (lrjax.recovery.fit_tensor_completion, tensor),
}


def ends(printed):
    """The last number of each bar; one begins at zero."""
    counts = [int(k) for k in re.findall(r"(\d+)/\d+ \[", printed)]
    assert counts[0] == 0
    return [k for k, after in zip(counts, [*counts[1:], 0], strict=True) if after == 0]


@pytest.mark.slow_but("fit_robust_tensor")
@pytest.mark.parametrize("name", FITS)
def test_bars_count_the_steps_and_change_nothing(name, capsys):
    """One for each run on the way, of which there are many, and for a batch not more."""
    fit, data = FITS[name]
    x = data(KEY)
    assert "callback" not in str(jax.make_jaxpr(fit)(x))
    quiet = jax.block_until_ready(jax.jit(fit)(x))
    assert not capsys.readouterr().err
    shown = jax.jit(lambda x: fit(x, progress=True))
    for _ in range(2):
        found = jax.block_until_ready(shown(x))
        jax.effects_barrier()
        taken = ends(capsys.readouterr().err)
        # That of a completion counts on when all entries are there.
        assert (max if name == "fit_completion" else sum)(taken) == found.steps
    for a, b in zip(jax.tree.leaves(quiet), jax.tree.leaves(found), strict=True):
        assert_array_equal(a, b)
    jax.block_until_ready(jax.jit(jax.vmap(shown))(jnp.stack([x, x])))
    jax.effects_barrier()
    assert len(ends(capsys.readouterr().err)) == len(taken)
