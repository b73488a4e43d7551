"""Preconditioners with a factor for each side: PSGD Kron and KL-Shampoo."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from tests.helpers import assert_close


every_matrix = lambda path, shape: len(shape) >= 2
KL = {"numerator": optax.ema(0.9), "refresh_every": 3, "where": every_matrix}


def run(tx, grads, state=None):
    """The last state and all updates; the gradients of one leaf, or a stack."""
    first = jnp.zeros_like(grads[0])

    @jax.jit
    def steps(state, grads):
        step = lambda state, g: tx.update(g, state, first)[::-1]
        return jax.lax.scan(step, state, grads)

    return steps(tx.init(first) if state is None else state, grads)


def orthogonal(key, n, dtype=jnp.float32):
    return jnp.linalg.qr(jr.normal(key, (n, n), dtype))[0]


def test_psgd_kron_ends_in_the_polar_factor_of_a_constant_gradient(getkey, x64):
    u, v = (orthogonal(getkey(), 5, jnp.float64) for _ in range(2))
    g = 100 * u @ jnp.diag(jnp.linspace(1, 4, 5)) @ v
    tx = lrjax.scale_by_psgd_kron(where=every_matrix)
    _, updates = run(tx, jnp.broadcast_to(g, (600, 5, 5)))
    assert_close(updates[-1], 5**0.5 * u @ v, rtol=1e-6)


@pytest.mark.slow
def test_psgd_kron_whitens_noise_that_is_a_product(getkey):
    """Gradients ``A Z B``: in the end all entries of ``X`` have one size on average."""
    rows, columns = jnp.logspace(0, -2, 6), jnp.logspace(0, -1, 9)
    noise = jr.normal(getkey(), (1200, 6, 9)) * jnp.outer(rows, columns)[None]
    _, updates = run(lrjax.scale_by_psgd_kron(0.05, where=every_matrix), noise)
    squares = jnp.mean(updates[400:] ** 2, axis=0)
    # Of 800 samples, and a factor that still moves: near one, where it was 10⁻⁶ to 1.
    assert 0.5 < jnp.min(squares) <= jnp.max(squares) < 1.5


@pytest.mark.slow
def test_psgd_kron_is_bounded_where_there_is_no_gradient(x64):
    """Of a dead row only the noise is whitened: ``P_ii = √n / (σ ‖P_r‖)``."""
    damping, n = 1e-4, 3
    g = jnp.zeros((4, n), jnp.float64).at[:n].set(jnp.eye(n) + 0.1)
    tx = lrjax.scale_by_psgd_kron(damping=damping, where=every_matrix)
    state, _ = run(tx, jnp.broadcast_to(g, (2000, 4, n)))
    left, right = (q @ q for q in (state.left, state.right))
    assert_close(left[3, 3], n**0.5 / (damping * jnp.linalg.norm(right)), rtol=1e-3)
    assert jnp.all(jnp.linalg.eigvalsh(left) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-30, 30])
@pytest.mark.parametrize(
    "tx",
    [
        lrjax.scale_by_psgd_kron(damping=0.0, where=every_matrix),
        lrjax.scale_by_kl_shampoo(eps=0.0, **KL),
    ],
    ids=["psgd_kron", "kl_shampoo"],
)
def test_updates_do_not_depend_on_the_size_of_the_gradients(tx, exponent, getkey):
    g = jr.normal(getkey(), (5, 6, 6))
    assert_close(run(tx, 2.0**exponent * g)[1], run(tx, g)[1], condition=1e3)


@pytest.mark.slow
def test_kl_shampoo_turns_with_its_gradients(getkey, x64):
    """Square ones: of others the first one leaves a null space, completed as it comes."""
    a, b = (orthogonal(getkey(), 6, jnp.float64) for _ in range(2))
    g = jr.normal(getkey(), (8, 6, 6), jnp.float64)
    tx = lrjax.scale_by_kl_shampoo(where=every_matrix, refresh_every=2)
    got = run(tx, a @ g @ b.T)[1]
    assert not got[0].any()
    assert_close(got, a @ run(tx, g)[1] @ b.T, condition=1e6)


@pytest.mark.slow
def test_kl_shampoo_without_bases_knows_second_moments_of_rank_one(getkey):
    """``|G_ij| = √(a_i b_j)``: the product of its eigenvalues is ``a bᵀ``."""
    a, b = (jnp.exp(jr.normal(getkey(), (n, 1))) for n in (5, 7))
    g = jnp.sqrt(a * b.T) * jnp.where(jr.bernoulli(getkey(), 0.5, (5, 7)), 1.0, -1.0)
    tx = lrjax.scale_by_kl_shampoo(0.9, max_side=0, where=every_matrix)
    state, updates = run(tx, jnp.broadcast_to(g, (300, 5, 7)))
    assert_close(state.left.values * state.right.values.mT, a * b.T, rtol=1e-3)
    assert_close(updates[-1], jnp.sign(g), rtol=1e-3)
    assert state.left.gram == optax.MaskedNode()


@pytest.mark.slow
def test_kl_factors_are_those_of_their_equations(getkey):
    """At rest ``L = E[G R⁻¹ Gᵀ]/n`` with ``R`` from its own eigenvalues: a product."""
    left = jr.normal(getkey(), (4, 4)) + 3 * jnp.eye(4)
    right = jr.normal(getkey(), (5, 5)) + 3 * jnp.eye(5)
    noise = left @ jr.normal(getkey(), (3000, 4, 5)) @ right.T
    tx = lrjax.scale_by_kl_shampoo(0.998, where=every_matrix)
    state, _ = run(tx, noise)
    covariance = lambda side: side.basis * side.values.mT @ side.basis.mT
    got = jnp.kron(covariance(state.left), covariance(state.right))
    want = jnp.kron(left @ left.T, right @ right.T)
    # A mean of about 500 gradients of 20 numbers each.
    assert jnp.linalg.norm(got - want) < 0.25 * jnp.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    "tx",
    [
        lrjax.scale_by_psgd_kron(where=every_matrix),
        lrjax.scale_by_kl_shampoo(refresh_every=2, where=every_matrix),
    ],
    ids=["psgd_kron", "kl_shampoo"],
)
def test_a_gradient_that_is_none_changes_no_factor(tx, bad, getkey):
    g = jr.normal(getkey(), (3, 2, 6, 6))
    before, _ = run(tx, g)
    spoiled = g[:1].at[:, 1].multiply(bad)  # the second matrix of two
    after, updates = run(tx, spoiled, before)
    for name in ("left", "right"):
        old, new = getattr(before, name), getattr(after, name)
        second = lambda tree: jax.tree.map(lambda x: x[1], tree)
        if isinstance(tx.init(g[0]), lrjax.transforms.ScaleByPSGDKronState):
            assert_close(second(new), second(old), rtol=0)
            assert not updates[:, 1].any()
        else:
            assert_close(second(new.values), second(old.values), rtol=0)
            assert_close(second(new.gram), second(old.gram), rtol=0)
        first = lambda tree: jax.tree.leaves(tree)[0][0]
        assert jnp.any(first(new) != first(old))


@pytest.mark.parametrize(
    ("recipe", "longest"), [(lrjax.kl_shampoo, 10000), (lrjax.psgd_kron, 8192)]
)
def test_sides_that_are_longer_have_no_matrix(recipe, longest):
    def has_matrix(side):
        params = {"w": jax.ShapeDtypeStruct((8, side), jnp.float32)}
        state = jax.eval_shape(recipe(0.1).init, params)
        return (side, side) in [x.shape for x in jax.tree.leaves(state)]

    assert has_matrix(longest)
    assert not has_matrix(longest + 1)


@pytest.mark.slow
def test_the_factors_of_both_sides_stay_of_one_size(getkey):
    tx = lrjax.scale_by_psgd_kron(where=every_matrix)
    g = jr.normal(getkey(), (6, 40)) * jnp.geomspace(1, 1e-3, 40)[None]
    _, state = jax.jit(tx.update)(g, tx.init(g))
    sizes = [jnp.max(jnp.abs(factor)) for factor in (state.left, state.right)]
    assert_close(sizes[0], sizes[1])
