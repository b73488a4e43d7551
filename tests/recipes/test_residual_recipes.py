"""Each recipe that follows what its subspace leaves out: one exact fact about it."""

import jax.numpy as jnp
import optax

import lrjax

from ..helpers import assert_close


anything = lambda path, shape: len(shape) >= 2


def test_snsm_at_full_rank_is_adam_sn(rollout, noisy, getkey, x64):
    g = {"w": noisy(getkey(), 5, 6, 9, dtype=jnp.float64)}
    g["b"] = g["w"][:, 0]
    got, _ = rollout(lrjax.snsm(0.1, 6, where=anything), g)
    want, _ = rollout(lrjax.adam_sn(0.1), g)
    assert_close(got, want, condition=10)
    assert_close(want["b"], rollout(optax.adam(0.1), g["b"])[0])
