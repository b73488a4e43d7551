"""Updates without conflicts with memories: A-GEM, GEM, and the quadratic program."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax

from ..helpers import assert_close


SIZES = {"w": (4, 3), "b": (5,)}


def flat(tree):
    leaves = [np.asarray(tree[name]) for name in SIZES]
    batch = leaves[0].shape[: leaves[0].ndim - len(SIZES["w"])]
    return np.concatenate([x.reshape(*batch, -1) for x in leaves], axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def trees(key, count):
    """A gradient and memories that have something in common, so that some bind."""
    keys = dict(zip(SIZES, jr.split(key, len(SIZES)), strict=True))
    draw = lambda name, *batch: jr.normal(keys[name], (*batch, *SIZES[name]))
    all_ = {name: draw(name, count + 1) for name in SIZES}
    g = {name: x[0] for name, x in all_.items()}
    return g, {name: x[1:] - 0.3 * x[:1] for name, x in all_.items()}


@functools.partial(jax.jit, static_argnames=("of", "sweeps"))
def project(g, memory, margin=0.0, damping=0.0, of="gradients", sweeps=50):
    tx = lrjax.project_conflicts(margin, damping=damping, of=of, sweeps=sweeps)
    return tx.update(g, tx.init(g), memory=memory)


def quadratic_program(g, m, margin=0.0, damping=0.0):
    """The dual with its bounds, solved by trying every set of bounds that bind."""
    gram, along = m @ m.T, m @ g
    if not np.any(along < 0):
        return g
    gram = gram + damping * np.diag(np.diag(gram))
    t, best = len(m), None
    for binds in itertools.product([False, True], repeat=t):
        binds = np.array(binds)
        v, free = np.full(t, margin, float), ~binds
        if free.any():
            rest = -along[free] - gram[np.ix_(free, binds)] @ v[binds]
            v[free] = np.linalg.solve(gram[np.ix_(free, free)], rest)
        value = v @ gram @ v / 2 + along @ v
        if np.all(v >= margin - 1e-12) and (best is None or value < best[0]):
            best = value, v
    return g + m.T @ best[1]


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_it_is_the_quadratic_program_of_gem(margin, damping, x64, getkey):
    g, memory = trees(getkey(), 5)
    new, state = project(g, memory, margin, damping, sweeps=200)
    m = flat(memory)
    want = quadratic_program(flat(g), m, margin, damping)
    cosines = m @ m.T / np.sqrt(np.outer(*[np.diag(m @ m.T)] * 2))
    assert_close(flat(new), want, condition=1e3 * np.linalg.cond(cosines) ** 2)
    assert state.conflicts == np.sum(m @ flat(g) < 0)


def test_nothing_is_in_conflict_afterwards_and_nothing_nearer_is_free_of_it(x64, getkey):
    """Its own certificate: g' is feasible, g' − g in the cone of those that bind."""
    g, memory = trees(getkey(), 7)
    new, state = project(g, memory, sweeps=300)
    m, change = flat(memory), flat(new) - flat(g)
    left = m @ flat(new)
    assert left.min() > -1e-9
    assert state.violation < 1e-9
    # Complementary: along what does not bind there is no push, and every push is upward.
    v = np.linalg.lstsq(m.T, change, rcond=None)[0]
    assert v.min() > -1e-9
    assert abs(v @ left) < 1e-9


def test_of_one_memory_it_is_the_closed_form_of_a_gem(x64, getkey):
    g, memory = trees(getkey(), 1)
    toward = -np.sign(flat(memory)[0] @ flat(g))
    memory = jax.tree.map(lambda m: toward * m, memory)
    new, state = project(g, memory)
    m, u = flat(memory)[0], flat(g)
    assert_close(flat(new), u - (u @ m) / (m @ m) * m)
    assert abs(flat(new) @ m) < 1e-12
    assert np.linalg.norm(flat(new)) <= np.linalg.norm(u)
    assert state.conflicts == 1
    same, state = project(g, jax.tree.map(jnp.negative, memory))
    assert all(np.array_equal(same[k], g[k]) for k in SIZES)
    assert state.conflicts == 0


@pytest.mark.slow
def test_memories_without_a_gradient_bind_nothing(getkey):
    g, memory = trees(getkey(), 3)
    memory = jax.tree.map(lambda m: m.at[0].set(0), memory)
    full = project(g, memory, margin=0.5)[0]
    rest = jax.tree.map(lambda m: m[1:], memory)
    assert_close(full, project(g, rest, margin=0.5)[0], condition=100)
    empty = jax.tree.map(jnp.zeros_like, memory)
    assert_close(project(g, empty)[0], g)


def test_how_long_the_gradient_of_a_memory_is_does_not_matter(x64, getkey):
    g, memory = trees(getkey(), 4)
    long = jax.tree.map(lambda m: m.at[1].mul(1e6).at[2].mul(1e-6), memory)
    for damping in (0.0, 0.1):
        new = project(g, long, damping=damping)[0]
        assert_close(new, project(g, memory, damping=damping)[0], condition=1e3)


@pytest.mark.slow
def test_a_whole_optimizer_is_followed_by_a_projection_of_steps(x64, getkey):
    """−η g behind the learning rate is g before it, for a constant one."""
    g, memory = trees(getkey(), 3)
    steps = jax.tree.map(lambda x: -0.1 * x, g)
    got = project(steps, memory, of="steps")[0]
    want = jax.tree.map(lambda x: -0.1 * x, project(g, memory)[0])
    assert_close(got, want, condition=100)
    assert np.all(flat(memory) @ flat(got) < 1e-9)


def test_last_in_the_chain_is_what_keeps_the_promise(x64, getkey):
    """Signs of a projected gradient are in conflict again; projected signs are not."""
    g, memory = trees(getkey(), 1)
    toward = -np.sign(flat(memory)[0] @ flat(g))
    memory = jax.tree.map(lambda m: toward * m, memory)
    last = optax.chain(optax.scale_by_sign(), lrjax.project_conflicts())
    one = jax.jit(lambda g, m: last.update(g, last.init(g), memory=m)[0])
    assert flat(memory)[0] @ flat(one(g, memory)) > -1e-12


def test_members_of_a_vmap_are_on_their_own(getkey):
    pairs = [trees(key, 3) for key in jr.split(getkey(), 4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
    together = jax.jit(jax.vmap(project))(*stacked)
    for i, pair in enumerate(pairs):
        want = project(*pair)
        assert_close(jax.tree.map(lambda x, i=i: x[i], together)[0], want[0], condition=100)


@pytest.mark.usefixtures("shapes_unchecked")
def test_errors(getkey):
    g, memory = trees(getkey(), 2)
    with pytest.raises(ValueError, match="margin >= 0, got -1"):
        lrjax.project_conflicts(-1.0)
    with pytest.raises(ValueError, match="of='gradients' or of='steps', got 'up'"):
        lrjax.project_conflicts(of="up")
    with pytest.raises(ValueError, match="at least one sweep, got 0"):
        lrjax.project_conflicts(sweeps=0)
    tx = lrjax.project_conflicts()
    state = tx.init(g)
    with pytest.raises(ValueError, match="needs the extra argument memory"):
        tx.update(g, state)
    with pytest.raises(ValueError, match=r"for b of shape \(5,\) .* shape \(5,\)"):
        tx.update(g, state, memory=g)
    with pytest.raises(ValueError, match=r"for b of shape .* it has nothing"):
        tx.update(g, state, memory={**memory, "b": None})
    with pytest.raises(ValueError, match=r"same number of memories .* \[1, 2\]"):
        tx.update(g, state, memory={**memory, "b": memory["b"][:1]})
