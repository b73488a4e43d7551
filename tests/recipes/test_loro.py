"""Fixed-rank retraction and LORO against dense matrices."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank


def truncated(x, rank):
    u, s, vt = np.linalg.svd(np.asarray(x), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def project(x, g):
    """``G`` on the tangent space at ``X``, by dense projectors."""
    left, right = np.asarray(x.left), np.asarray(x.right)
    p, q = left @ np.linalg.pinv(left), right @ np.linalg.pinv(right)
    return p @ g + g @ q - p @ g @ q


def factor_gradients(x, g):
    return lrjax.LowRank(g @ x.right, g.mT @ x.left)


@jax.jit
def retracted(x, u):
    step, _ = lrjax.retract().update(u, optax.EmptyState(), x)
    return optax.apply_updates(x, step)


@pytest.mark.slow
def test_retract_is_the_best_approximation_of_the_first_order_step(getkey, x64):
    x = random_low_rank(getkey(), 7, 9, 2, batch=(2,), dtype=jnp.float64)
    u = random_low_rank(getkey(), 7, 9, 2, batch=(2,), dtype=jnp.float64)
    new = retracted(x, u)
    first_order = x.materialize() + u.left @ x.right.mT + x.left @ u.right.mT
    assert_close(new.materialize(), truncated(first_order, 2), condition=1e3)
    assert_close(new.left.mT @ new.left, new.right.mT @ new.right, condition=1e3)
    # It does not depend on how the product is factorized.
    q = jr.normal(getkey(), (2, 2), jnp.float64) + 2 * jnp.eye(2)
    change = lambda z: lrjax.LowRank(z.left @ q, z.right @ jnp.linalg.inv(q).T)
    assert_close(
        retracted(change(x), change(u)).materialize(), new.materialize(), condition=1e4
    )
    # Balanced factors that take no step stay where they are.
    still = jax.tree.map(jnp.zeros_like, u)
    assert_close(retracted(new, still), new, condition=100)


def test_exact_steps_are_riemannian_gradient_steps(getkey, x64):
    """SVD_r(X − η P(G)) of a dense gradient, for every factorization, for three steps."""
    x = random_low_rank(getkey(), 7, 9, 2, dtype=jnp.float64)
    x = lrjax.LowRank(10 * x.left, x.right)
    target = jr.normal(getkey(), (7, 9), jnp.float64)
    tx = lrjax.loro(0.3, exact_every=1, inner=optax.identity())

    @jax.jit
    def step(x, state):
        grads = factor_gradients(x, x.materialize() - target)
        updates, state = tx.update(grads, state, x)
        return optax.apply_updates(x, updates), state

    state = tx.init(x)
    for _ in range(3):
        dense = np.asarray(x.materialize())
        want = truncated(dense - 0.3 * project(x, dense - np.asarray(target)), 2)
        x, state = step(x, state)
        assert_close(x.materialize(), want, condition=1e4)
        assert_close(x.left.T @ x.left, x.right.T @ x.right, condition=1e4)


def test_plain_steps_in_between(getkey, x64):
    x = random_low_rank(getkey(), 7, 9, 2, dtype=jnp.float64)
    grads = random_low_rank(getkey(), 7, 9, 2, dtype=jnp.float64)
    tx, plain = lrjax.loro(0.1, exact_every=3), optax.adam(0.1)

    def run(tx):
        step = lambda state, _: tx.update(grads, state, x)[::-1]
        return jax.lax.scan(step, tx.init(x), length=4)[1]

    got, want = jax.jit(lambda: (run(tx), run(plain)))()
    at = lambda tree, t: jax.tree.map(lambda z: z[t], tree)
    for t in (0, 1, 3):
        assert_close(at(got, t), at(want, t))
    # The third is exact, of Adam's direction; its core has two values, which are averaged.
    k_l, k_r = (np.linalg.inv(z.T @ z) for z in (np.asarray(x.left), np.asarray(x.right)))
    a, b = np.asarray(want.left[2]), np.asarray(want.right[2])
    left, right = np.asarray(x.left), np.asarray(x.right)
    core = (left.T @ a + b.T @ right) / 2
    move = a @ k_r @ right.T + left @ k_l @ b.T - left @ k_l @ core @ k_r @ right.T
    new = optax.apply_updates(x, at(got, 2)).materialize()
    assert_close(new, truncated(left @ right.T + move, 2), condition=1e4)


@pytest.mark.slow
def test_a_zero_factor_and_one_too_wide(getkey):
    x = random_low_rank(getkey(), 7, 9, 2)
    fresh = lrjax.LowRank(x.left, jnp.zeros((9, 2)))  # as adapters start
    u = random_low_rank(getkey(), 7, 9, 2)
    new = retracted(fresh, u)
    assert_close(new.materialize(), fresh.left @ u.right.T, condition=100)
    zero = jax.tree.map(jnp.zeros_like, x)
    assert_close(retracted(zero, u), zero)
    wide = random_low_rank(getkey(), 3, 9, 4)
    with pytest.raises(ValueError, match="no wider than the matrix"):
        lrjax.retract().update(wide, optax.EmptyState(), wide)
