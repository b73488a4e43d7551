"""SOAP against a slow dense reference, its special cases, and where its QR may run."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import assert_close
from tests.reference.soap import soap as reference


every_matrix = lambda path, shape: len(shape) >= 2
ADAM = optax.scale_by_adam(0.95, 0.95)
M, N, STEPS, EVERY = 5, 7, 9, 3


@functools.cache
def rotate(**settings):
    own = {"refresh_every": EVERY, "where": every_matrix, **settings}
    return lrjax.rotate_updates(ADAM, **own)


@functools.cache
def compiled(tx):
    """A scan over gradients, compiled once for each transform and shape."""
    step = lambda state, g: tx.update(g, state)[::-1]
    first = lambda grads: jax.tree.map(lambda g: g[0], grads)
    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(first(grads)), grads)[1])


def run(tx, grads):
    """All updates."""
    return compiled(tx)(grads)


def gradients(key, *batch, m=M, n=N):
    """Noise around a fixed matrix whose size differs along both axes."""
    fixed, fresh = jr.split(key)
    scale = jnp.logspace(0, -1, m)[:, None] * jnp.logspace(0, -1, n)[None]
    mean = jr.normal(fixed, (1, *batch, m, n), jnp.float64)
    g = mean + jr.normal(fresh, (STEPS, *batch, m, n), jnp.float64)
    return g * scale.reshape(*(1 for _ in range(g.ndim - 2)), m, n)


# The first gradient has no null space on a side that is rotated: eigenvectors of a
# repeated eigenvalue are anybody's choice.
@pytest.mark.slow_but("right")
@pytest.mark.parametrize(
    ("side", "n"), [("both", M), ("right", M), ("short", N)], ids=["both", "right", "short"]
)
def test_equals_the_reference(side, n, getkey, x64):
    g = gradients(getkey(), n=n)
    got = run(rotate(side=side), g)
    left, right = side in ("both", "short"), side in ("both", "right")
    want = reference(list(np.asarray(g)), left=left, right=right, every=EVERY)
    assert not np.any(got[0])
    assert_close(got, np.stack(want), condition=1e4)


@pytest.mark.slow
def test_a_stack_is_a_loop_and_leaves_take_turns(getkey, x64):
    """The second of two leaves refreshes at half of the period: other steps, same rule."""
    g = gradients(getkey(), 2, n=M)
    stacked = run(rotate(), {"first": g, "second": g})
    for layer in range(2):
        want = reference(list(np.asarray(g[:, layer])), every=EVERY)
        assert_close(stacked["first"][:, layer], np.stack(want), condition=1e4)
    # Until the first refresh both have the basis of the first gradient.
    same = lambda t: float(jnp.abs(stacked["first"][t] - stacked["second"][t]).max())
    first_turn_of_second = next(t for t in range(1, 9) if (t + EVERY // 2) % EVERY == 0)
    assert same(first_turn_of_second) == 0
    assert same(first_turn_of_second + 1) > 1e-3


@pytest.mark.slow
def test_identity_bases_are_adam(getkey, x64):
    g = gradients(getkey())
    got = run(rotate(max_side=1), g)
    assert_close(got[1:], run(ADAM, g[1:]))
    one_sided = run(rotate(max_side=M), g)
    assert_close(one_sided, run(rotate(side="left"), g))


@pytest.mark.slow
def test_rotated_gradients_give_rotated_updates(getkey, x64):
    g = gradients(getkey(), n=M)
    u = jnp.linalg.qr(jr.normal(getkey(), (M, M), jnp.float64))[0]
    v = jnp.linalg.qr(jr.normal(getkey(), (M, M), jnp.float64))[0]
    turn = lambda x: jnp.einsum("ij,tjk,lk->til", u, x, v)
    assert_close(run(rotate(), turn(g)), turn(run(rotate(), g)), condition=1e4)
    # Adam itself is far from that.
    assert jnp.linalg.norm(run(ADAM, turn(g)) - turn(run(ADAM, g))) > 1


@pytest.mark.slow
def test_the_recipe_decays_and_gives_the_rest_to_adam(getkey):
    params = {"w": jr.normal(getkey(), (M, N)), "b": jr.normal(getkey(), (3,))}
    tx = lrjax.soap(0.1, weight_decay=0.5, where=every_matrix)

    @jax.jit
    def two_steps(params):
        first, state = tx.update(params, tx.init(params), params)
        return first, tx.update(params, state, params)[0]

    first, second = two_steps(params)
    assert_close(first, {"w": -0.05 * params["w"], "b": jnp.zeros(3)})
    assert_close(second["b"], -0.1 * jnp.sign(params["b"]), rtol=1e-5)


@pytest.mark.slow
def test_bad_gradients_enter_no_basis(getkey):
    tx = rotate()
    g = jr.normal(getkey(), (2, M, N))
    update = jax.jit(tx.update)
    _, state = update(g, tx.init(g))
    for _ in range(EVERY):
        bad = g.at[0, 0, 0].set(jnp.nan)
        _, new = update(bad, state)
        assert_close(new.left.gram[0], state.left.gram[0], rtol=0)
        assert bool(jnp.all(jnp.isfinite(new.left.basis)))
        assert not np.array_equal(new.left.gram[1], state.left.gram[1])
        state = new
    zero, state = update(jnp.zeros_like(g), tx.init(g))
    assert not jnp.any(zero)
    assert_close(state.right.basis, jnp.broadcast_to(jnp.eye(N), (2, N, N)))


def outside_of_branches(jaxpr):
    """The primitives that run on every step."""
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        if eqn.primitive.name == "cond":
            continue
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                names |= outside_of_branches(inner)
    return names


@pytest.mark.slow
def test_no_factorization_on_ordinary_steps_under_vmap():
    g = jnp.ones((4, M, N))
    tx = rotate()
    states = jax.vmap(tx.init)(g)
    jaxpr = jax.make_jaxpr(jax.vmap(tx.update))(g, states).jaxpr
    names = outside_of_branches(jaxpr)
    assert "cond" in names
    assert not names & {"eigh", "qr", "geqrf", "householder_product", "cholesky", "svd"}


def test_unknown_inner_states_are_refused():
    inner = optax.scale_by_sm3()
    with pytest.raises(ValueError, match="register_moments"):
        lrjax.rotate_updates(inner, where=every_matrix).init(jnp.ones((M, N)))
