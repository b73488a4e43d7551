"""LoRA-Muon: what the product does, against dense matrices."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lrjax
from tests.helpers import assert_close, random_low_rank


def test_both_halves_move_the_product_by_half_a_polar_factor(getkey, x64):
    """``polar(G Q) Qᵀ`` with an orthonormal basis Q of the partner, of the momentum's G."""
    x = random_low_rank(getkey(), 7, 9, 2, dtype=jnp.float64)
    x = lrjax.LowRank(30 * x.left, x.right)
    params = {"pair": x, "bias": jr.normal(getkey(), (3,), jnp.float64)}
    full = jr.normal(getkey(), (2, 7, 9), jnp.float64)
    tx = lrjax.lora_muon(0.2, damping=0.0, momentum=0.5)

    def grads(g):
        return {"pair": lrjax.LowRank(g @ x.right, g.T @ x.left), "bias": params["bias"]}

    @jax.jit
    def two_steps(first, second):
        _, state = tx.update(grads(first), tx.init(params), params)
        return tx.update(grads(second), state, params)[0]

    step = two_steps(*full)
    g = np.asarray(0.5 * full[0] + full[1])  # the factors stayed, so the momenta add up

    def polar(a):
        u, _, vt = np.linalg.svd(a, full_matrices=False)
        return u @ vt

    q_l, q_r = (np.linalg.qr(np.asarray(z))[0] for z in (x.left, x.right))
    want_left = -0.1 * polar(g @ q_r) @ q_r.T
    want_right = -0.1 * q_l @ polar(g.T @ q_l).T
    assert_close(step["pair"].left @ x.right.T, want_left, condition=1e5)
    assert_close(x.left @ step["pair"].right.T, want_right, condition=1e5)
    adam = params["bias"] / (jnp.abs(params["bias"]) + 1e-8)  # of equal gradients
    assert_close(step["bias"], -0.2 * adam, condition=1e3)
    moved = lrjax.LowRank(x.left, step["pair"].right).materialize()
    moved += lrjax.LowRank(step["pair"].left, x.right).materialize()
    assert jnp.linalg.norm(moved, 2) <= 0.2 * (1 + 1e-9)
