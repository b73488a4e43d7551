"""The fitted low-rank preconditioner: reference, invariants of the group, fixed points."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.helpers import assert_close
from tests.reference.psgd import psgd as reference


N, RANK = 8, 2


def dense(state):
    """``P`` of a state whose parameters are one vector."""
    eye = jnp.eye(state.diagonal.shape[-1], dtype=state.diagonal.dtype)
    q = (eye + state.left @ state.right.T) * state.diagonal[None]
    return q.T @ q


@functools.cache
def fit(rate, keep_all=False):
    """A compiled run of the fit over pairs of vectors, from a key: P, or all of them."""

    @jax.jit
    def run(key, noise, images):
        tx = lrjax.scale_by_low_rank_curvature(RANK, rate, key=key)

        def step(state, pair):
            _, state = tx.update(pair[1], state, pair=pair)
            return state, (dense(state), state) if keep_all else None

        state = tx.init(noise[0])
        last, every = jax.lax.scan(step, state, (noise, images))
        return state, (every if keep_all else dense(last))

    return run


def vectors(key, steps):
    return jr.normal(key, (steps, N), jnp.float64)


def test_equals_the_reference(getkey, x64):
    noise = vectors(getkey(), 7)
    images = noise @ jr.normal(getkey(), (N, N), jnp.float64)
    start, (got, _) = fit(0.3, keep_all=True)(getkey(), noise, images)
    pairs = list(zip(np.asarray(noise), np.asarray(images), strict=True))
    want = reference(*(np.asarray(x) for x in start[1:4]), pairs, 0.3)
    assert_close(got, want, condition=1e6)


def test_no_step_makes_the_preconditioner_singular(getkey, x64):
    """Wild pairs at a large rate: Q keeps its sign, and P is positive definite."""
    wild = lambda x: jnp.sign(x) * jnp.abs(x) ** 5
    noise, images = (wild(vectors(getkey(), 300)) for _ in range(2))
    start, (p, states) = fit(0.9, keep_all=True)(getkey(), noise, images)
    sign = jax.vmap(lambda u, v: jnp.linalg.slogdet(jnp.eye(RANK) + v.T @ u)[0])
    assert jnp.all(states.diagonal > 0)
    assert jnp.all(sign(states.left, states.right) == sign(*(x[None] for x in start[1:3])))
    assert jnp.all(jnp.isfinite(p))


def test_the_inverse_hessian_is_a_fixed_point(getkey, x64):
    """Where it has the form of P, no pair moves it: a fit without a floor of noise."""
    tx = lrjax.scale_by_low_rank_curvature(RANK, 0.5)
    state = tx.init(jnp.zeros(N))
    # Balanced factors: another split of U Vᵀ would be moved towards this one.
    frames = jnp.linalg.qr(jr.normal(getkey(), (2, N, RANK), jnp.float64))[0]
    u, v = 0.5 * frames
    d = jnp.exp(vectors(getkey(), 1)[0])
    state = state._replace(left=u, right=v, diagonal=d, limits=jnp.ones(3))
    noise = vectors(getkey(), 1)[0]
    image = jnp.linalg.solve(dense(state), noise)
    _, new = jax.jit(lambda s: tx.update(image, s, pair=(noise, image)))(state)
    assert_close(new[1:4], state[1:4], condition=1e4)
    # A pair of another Hessian does.
    _, new = tx.update(noise, state, pair=(noise, noise))
    assert jnp.linalg.norm(new.left - u) > 1e-3


def test_newton_like_rate_on_a_quadratic(x64):
    """Fitted on Hessian-vector products, a step leaves less than a sixth of the error."""

    def rates(key):
        ku, kv, kd, kn, kt = jr.split(key, 5)
        u, v = (0.2 * jr.normal(k, (N, RANK), jnp.float64) for k in (ku, kv))
        q = (jnp.eye(N) + u @ v.T) * jnp.exp(0.3 * vectors(kd, 1))
        hessian = jnp.linalg.inv(q.T @ q)
        noise = vectors(kn, 6000)
        _, p = fit(0.5)(kt, noise, noise @ hessian)
        values = jnp.linalg.eigvalsh(hessian)
        best = (values[-1] - values[0]) / (values[-1] + values[0])
        return jnp.linalg.norm(jnp.eye(N) - p @ hessian, 2), best

    newton, gradient_descent = jax.vmap(rates)(jr.split(jr.key(3), 8))
    assert jnp.max(newton) < 1 / 6, newton
    assert jnp.min(gradient_descent) > 0.5


def test_gradients_are_whitened(x64):
    """P → E[g gᵀ]^(−½): P C P has its eigenvalues near one, for five seeds."""
    values = jnp.array([100.0, 30.0] + [1.0] * (N - 2))

    def spectrum(key):
        kq, kn, kg, kt = jr.split(key, 4)
        basis = jnp.linalg.qr(jr.normal(kq, (N, N), jnp.float64))[0]
        images = vectors(kg, 20000) * jnp.sqrt(values)[None] @ basis.T
        _, p = fit(0.02)(kt, vectors(kn, 20000), images)
        return jnp.linalg.eigvalsh(p @ (basis * values[None]) @ basis.T @ p)

    got = jax.vmap(spectrum)(jr.split(jr.key(4), 5))
    assert jnp.min(got) > 0.6, got
    assert jnp.max(got) < 1.6, got


def test_a_tree_is_its_vector(getkey, x64):
    """Leaves of any shape, and one number: the same as the vector of all of them."""
    tree = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(N - 7), "s": jnp.zeros(())}
    tree = jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    tx = lrjax.scale_by_low_rank_curvature(RANK)
    state = tx.init(flat)
    split = lambda tall: jax.vmap(unravel, in_axes=1, out_axes=-1)(tall)
    as_tree = state._replace(
        left=split(state.left), right=split(state.right), diagonal=unravel(state.diagonal)
    )
    g, *pair = vectors(getkey(), 3)
    update = jax.jit(lambda g, state, pair: tx.update(g, state, pair=pair))
    want, _ = update(g, state, pair)
    got, new = update(unravel(g), as_tree, jax.tree.map(unravel, pair))
    assert_close(got, unravel(want), condition=1e3)
    assert new.left["s"].shape == (RANK,)


def test_size_of_the_gradient_and_unusable_ones(getkey):
    g = {"w": jr.normal(getkey(), (4, 6))}
    tx = lrjax.scale_by_low_rank_curvature(RANK)
    update = jax.jit(tx.update)
    state = tx.init(g)
    first, after = update(g, state)
    for scale in (1e-3, 1e12):
        scaled, _ = update({"w": scale * g["w"]}, state)
        assert_close(scaled, first, condition=1e3)
    for bad in (0.0, jnp.nan, jnp.inf):
        still, new = update({"w": bad * g["w"]}, after)
        assert not np.any(still["w"])
        assert_close(new._replace(count=after.count), after, rtol=0)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="rank >= 1"):
        lrjax.scale_by_low_rank_curvature(0)
