"""Each recipe that follows what its subspace leaves out: one exact fact about it."""

import jax.numpy as jnp
import numpy as np
import optax

import lrjax

from ..helpers import assert_close
from ..reference.subset_norm import snsm


anything = lambda path, shape: len(shape) >= 2


def test_snsm_is_the_dense_reference(rollout, noisy, getkey, x64):
    g = noisy(getkey(), 6, 5, 8, dtype=jnp.float64) * jnp.arange(1, 7.0)[:, None, None]
    want = jnp.asarray(np.stack(snsm(np.asarray(g), 2, 3)))
    tx = lrjax.snsm(1.0, 2, refresh_every=3, where=anything)
    got, _ = rollout(tx, g.mT)
    assert_close(-got.mT, want, condition=100)


def test_snsm_at_full_rank_is_adam_sn(rollout, noisy, getkey, x64):
    g = {"w": noisy(getkey(), 5, 6, 9, dtype=jnp.float64)}
    g["b"] = g["w"][:, 0]
    got, _ = rollout(lrjax.snsm(0.1, 6, where=anything), g)
    want, _ = rollout(lrjax.adam_sn(0.1), g)
    assert_close(got, want, condition=10)
    assert_close(want["b"], rollout(optax.adam(0.1), g["b"])[0])
