"""The fitted low-rank preconditioner: reference, invariants of the group, fixed points."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.helpers import all_finite, assert_close
from tests.reference.psgd import psgd as reference


N, RANK = 8, 2
LONG, STEPS, SEEDS = 300, 12000, 8


def dense(state):
    """``P`` of a state whose parameters are one vector."""
    eye = jnp.eye(state.diagonal.shape[-1], dtype=state.diagonal.dtype)
    q = (eye + state.left @ state.right.T) * state.diagonal[None]
    return q.T @ q


def fit(key, rate, noise, images):
    """The first state and those after each pair of vectors."""
    tx = lrjax.scale_by_psgd(RANK, rate, key=key)

    def step(state, pair):
        state = tx.update(pair[1], state, pair=pair)[1]
        return state, state

    state = tx.init(noise[0])
    return state, jax.lax.scan(step, state, (noise, images))[1]


fit_one = jax.jit(fit)


@jax.jit
def fitted(keys, rate, noise, images):
    """The mean of ``P`` over the last quarter of the pairs, one a key."""

    def mean(*data):
        late = jax.tree.map(lambda x: x[-STEPS // 4 :], fit(*data)[1])
        return jax.vmap(dense)(late).mean(0)

    return jax.vmap(mean, in_axes=(0, None, 0, 0))(keys, rate, noise, images)


def vectors(key, *shape):
    return jr.normal(key, (*shape, N), jnp.float64)


def test_equals_the_reference(getkey, x64):
    noise = vectors(getkey(), LONG)
    images = noise @ jr.normal(getkey(), (N, N), jnp.float64)
    start, states = fit_one(getkey(), 0.3, noise, images)
    pairs = list(zip(np.asarray(noise[:7]), np.asarray(images[:7]), strict=True))
    want = reference(*(np.asarray(x) for x in start[1:4]), pairs, 0.3)
    got = jax.vmap(dense)(jax.tree.map(lambda x: x[:7], states))
    assert_close(got, want, condition=1e6)


def test_no_step_makes_the_preconditioner_singular(getkey, x64):
    """Wild pairs at a large rate: Q keeps its sign, and P is positive definite."""
    wild = lambda x: jnp.sign(x) * jnp.abs(x) ** 5
    noise, images = (wild(vectors(getkey(), LONG)) for _ in range(2))
    start, states = fit_one(getkey(), 0.9, noise, images)
    sign = jax.vmap(lambda u, v: jnp.linalg.slogdet(jnp.eye(RANK) + v.T @ u)[0])
    assert jnp.all(states.diagonal > 0)
    assert jnp.all(sign(states.left, states.right) == sign(*(x[None] for x in start[1:3])))
    assert all_finite(states)


@pytest.mark.slow
def test_newton_like_rate_on_a_quadratic(x64):
    """Fitted on Hessian-vector products, a step leaves less than a sixth of the error."""

    def hessian(key):
        ku, kv, kd = jr.split(key, 3)
        u, v = (0.2 * vectors(k, RANK).T for k in (ku, kv))
        q = (jnp.eye(N) + u @ v.T) * jnp.exp(0.3 * vectors(kd, 1))
        return jnp.linalg.inv(q.T @ q)

    h = jnp.stack([hessian(key) for key in jr.split(jr.key(3), SEEDS)])
    noise = vectors(jr.key(4), SEEDS, STEPS)
    p = fitted(jr.split(jr.key(5), SEEDS), 0.5, noise, noise @ h)
    newton = jnp.linalg.norm(jnp.eye(N)[None] - p @ h, 2, axis=(-2, -1))
    values = jnp.linalg.eigvalsh(h)
    ends = values[:, -1], values[:, 0]
    gradient_descent = (ends[0] - ends[1]) / (ends[0] + ends[1])
    assert jnp.max(newton) < 1 / 6, newton
    assert jnp.min(gradient_descent) > 0.5


@pytest.mark.slow
def test_gradients_are_whitened(x64):
    """P → E[g gᵀ]^(−½): P C P has its eigenvalues near one, for every seed."""
    values = jnp.array([100.0, 30.0] + [1.0] * (N - 2))
    basis = jnp.linalg.qr(jr.normal(jr.key(6), (SEEDS, N, N), jnp.float64))[0]
    images = vectors(jr.key(7), SEEDS, STEPS) * jnp.sqrt(values)[None, None] @ basis.mT
    noise = vectors(jr.key(8), SEEDS, STEPS)
    p = fitted(jr.split(jr.key(9), SEEDS), 0.02, noise, images)
    got = jnp.linalg.eigvalsh(p @ (basis * values[None, None]) @ basis.mT @ p)
    assert jnp.min(got) > 0.6, got
    assert jnp.max(got) < 1.6, got


@jax.jit
def one_pair(g, state, pair):
    return lrjax.scale_by_psgd(RANK, 0.5).update(g, state, pair=pair)


@pytest.mark.slow
def test_the_inverse_hessian_is_a_fixed_point(getkey, x64):
    """Where it has the form of P, no pair moves it: a fit without a floor of noise."""
    state = lrjax.scale_by_psgd(RANK).init(jnp.zeros(N))
    # Balanced factors: another split of U Vᵀ would be moved towards this one.
    frames = jnp.linalg.qr(jr.normal(getkey(), (2, N, RANK), jnp.float64))[0]
    u, v = 0.5 * frames
    d = jnp.exp(vectors(getkey(), 1)[0])
    state = state._replace(left=u, right=v, diagonal=d, limits=jnp.ones(3))
    noise = vectors(getkey(), 1)[0]
    image = jnp.linalg.solve(dense(state), noise)
    _, new = one_pair(image, state, [noise, image])
    assert_close(new[1:4], state[1:4], condition=1e4)
    # A pair of another Hessian does.
    _, new = one_pair(image, state, [noise, noise])
    assert jnp.linalg.norm(new.left - u) > 1e-3


@pytest.mark.slow
def test_a_tree_is_its_vector(getkey, x64):
    """Leaves of any shape, and one number: the same as the vector of all of them."""
    tree = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(N - 7), "s": jnp.zeros(())}
    tree = jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    state = lrjax.scale_by_psgd(RANK).init(flat)
    split = lambda tall: jax.vmap(unravel, in_axes=1, out_axes=-1)(tall)
    as_tree = state._replace(
        left=split(state.left), right=split(state.right), diagonal=unravel(state.diagonal)
    )
    g, *pair = vectors(getkey(), 3)
    want, _ = one_pair(g, state, pair)
    got, new = one_pair(unravel(g), as_tree, jax.tree.map(unravel, pair))
    assert_close(got, unravel(want), condition=1e3)
    assert new.left["s"].shape == (RANK,)


@pytest.mark.slow
def test_size_of_the_gradient_and_unusable_ones(getkey):
    g = {"w": jr.normal(getkey(), (4, 6))}
    tx = lrjax.scale_by_psgd(RANK)
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
        lrjax.scale_by_psgd(0)
