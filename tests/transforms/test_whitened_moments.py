"""``scale_by_gram`` with a phi that remembers: moments in the frames of the partners."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.helpers import all_finite, assert_close, random_low_rank, with_spectrum
from tests.reference.whitened_moments import MatrixAdam, ProjectedMomentum


def gradient(x, target):
    residual = x.materialize() - target
    return lrjax.LowRank(residual @ x.right, residual.T @ x.left)


def trajectory(tx, x, target, steps=20, rate=0.1):
    """The products after every step of training on ``½ ‖X − target‖²``."""

    def body(carry, _):
        x, state = carry
        updates, state = tx.update(gradient(x, target), state, x)
        x = jax.tree.map(lambda a, u: a - rate * u, x, updates)
        return (x, state), x.materialize()

    return jax.lax.scan(body, (x, tx.init(x)), length=steps)[1]


def reference(make, x, target, *, alternating, steps=20, rate=0.1):
    left, right, target = (np.asarray(a) for a in (x.left, x.right, target))
    rules, products = (make(), make()), []
    for k in range(steps):
        residual = left @ right.T - target
        moves = [0.0, 0.0]
        if not alternating or k % 2 == 0:
            moves[0] = rules[0](residual @ right, right)
        if not alternating or k % 2 == 1:
            moves[1] = rules[1](residual.T @ left, left)
        left, right = left - rate * moves[0], right - rate * moves[1]
        products.append(left @ right.T)
    return np.stack(products)


@pytest.fixture
def problem(getkey, x64):
    target = with_spectrum(getkey(), 9, 7, [3.0, 1.0, 0.3], jnp.float64)
    return random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64), target


@pytest.mark.slow_but("jacobi-True")
@pytest.mark.parametrize("conserve", [True, False])
@pytest.mark.parametrize("order", ["jacobi", "alternating"])
def test_matrix_adam_is_its_equations(problem, conserve, order):
    x, target = problem
    adam = lrjax.scale_by_matrix_adam(0.8, 0.9, 1e-3, conserve=conserve)
    got = trajectory(lrjax.scale_by_gram(order=order, phi=adam), x, target)
    want = reference(
        lambda: MatrixAdam(0.8, 0.9, 1e-3, conserve),
        x,
        target,
        alternating=order == "alternating",
    )
    # Rounding grows along a trajectory whose steps do not shrink.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["jacobi", "alternating"])
def test_momentum_is_projected_on_the_new_span(problem, order):
    x, target = problem
    average = optax.ema(0.8, debias=False)
    got = trajectory(lrjax.scale_by_gram(order=order, phi=average), x, target)
    alternating = order == "alternating"
    want = reference(lambda: ProjectedMomentum(0.8), x, target, alternating=alternating)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)


PHIS = {
    "trace": optax.trace(0.9),
    "nesterov": optax.trace(0.9, nesterov=True),
    "moments": lrjax.scale_by_matrix_adam(0.9, 0.99),
    "published": optax.chain(
        optax.clip_by_global_norm(1.0),
        lrjax.scale_by_matrix_adam(0.9, 0.99, conserve=False),
    ),
}


@pytest.fixture
def regauged(problem, getkey):
    """Factors of one product that differ by an invertible matrix, stacked."""
    x, _ = problem
    q = jr.normal(getkey(), (3, 3), jnp.float64) / 2 + jnp.diag(jnp.array([4.0, 5.0, -3.0]))
    y = lrjax.LowRank(x.left @ q, x.right @ jnp.linalg.inv(q).T)
    return jax.tree.map(lambda *a: jnp.stack(a), x, y)


@pytest.mark.slow_but("trace-alternating", "trace-greedy")
@pytest.mark.parametrize("order", ["jacobi", "alternating", "greedy"])
@pytest.mark.parametrize("phi", PHIS.values(), ids=PHIS.keys())
def test_trajectories_of_the_product_ignore_the_gauge(problem, regauged, phi, order):
    _, target = problem
    tx = lrjax.scale_by_gram(order=order, phi=phi)
    x, y = jax.vmap(lambda x: trajectory(tx, x, target, rate=0.02))(regauged)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


def test_entries_of_factors_do_not_ignore_the_gauge(problem, regauged):
    """What Adam sees behind it: the test above can fail."""
    _, target = problem
    tx = optax.chain(lrjax.scale_by_gram(), optax.scale_by_adam())
    x, y = jax.vmap(lambda x: trajectory(tx, x, target, rate=0.02))(regauged)
    assert np.abs(x - y).max() > 1e-3


def test_a_phi_that_does_nothing_is_the_damped_step(problem):
    x, target = problem
    g = gradient(x, target)
    for damping in (0.0, 0.3, 10.0):
        plain, carried = (
            lrjax.scale_by_gram(damping, phi=phi) for phi in (None, optax.identity())
        )
        got, _ = carried.update(g, carried.init(x), x)
        assert_close(got, plain.update(g, plain.init(x), x)[0], condition=1e4)


def test_momentum_of_a_partner_that_stays_is_plain_momentum(problem):
    """Greedy never moves the right factor here, which has no gradient."""
    x, target = problem
    g = gradient(x, target)
    g = lrjax.LowRank(g.left, jnp.zeros_like(g.right))
    for damping in (0.0, 10.0):
        gram = lrjax.scale_by_gram(damping, order="greedy")
        behind = optax.chain(gram, optax.trace(0.9))
        inside = lrjax.scale_by_gram(damping, order="greedy", phi=optax.trace(0.9))
        states = behind.init(x), inside.init(x)
        for _ in range(3):
            want, first = behind.update(g, states[0], x)
            got, second = inside.update(g, states[1], x)
            states = first, second
            assert_close(got.left, want.left, condition=1e4)
            assert not got.right.any()


@pytest.mark.slow
def test_the_first_step_is_spectral(problem):
    """``√m`` times the polar factor of the whitened gradient."""
    x, target = problem
    tx = lrjax.scale_by_gram(phi=lrjax.scale_by_matrix_adam(eps=0.0))
    step, _ = tx.update(gradient(x, target), tx.init(x), x)
    values = np.linalg.svd(np.asarray(step.left @ x.right.T), compute_uv=False)[:3]
    np.testing.assert_allclose(values, np.sqrt(9), rtol=1e-6)


@pytest.mark.slow
def test_one_column_is_adam_with_one_second_moment(getkey, x64):
    grads = jr.normal(getkey(), (6, 5), jnp.float64)
    x = lrjax.LowRank(jnp.ones((5, 1)), jnp.ones((1, 1)))
    tx = lrjax.scale_by_matrix_adam(0.8, 0.9, 1e-3)
    state, m, v = tx.init(x), np.zeros(5), 0.0
    for t, g in enumerate(np.asarray(grads), start=1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (0.8, 0.9))
        v = b2 * v + (1 - b2) * np.mean(g**2)
        m = b1 * m + (1 - b1) * g / (np.sqrt(v) + 1e-3)
        node = lrjax.LowRank(jnp.asarray(g)[:, None], jnp.zeros((1, 1)))
        step, state = tx.update(node, state, x)
        assert_close(step.left[:, 0], jnp.asarray(m), condition=1e3)


@pytest.mark.slow
def test_steps_keep_their_size_while_the_frame_moves(getkey, x64):
    """Of noise that is alike in all directions, in a frame that is drawn anew each time.

    Variance that leaves with a direction and does not come in makes steps too long.
    """
    b2, n, rank = 0.9, 40, 4
    keys = jr.split(getkey(), 60)

    def sizes(conserve):
        tx = lrjax.scale_by_matrix_adam(0.0, b2, conserve=conserve)
        node = lambda a: lrjax.LowRank(a, jnp.ones((1, a.shape[-1])))

        def body(state, key):
            kg, kq = jr.split(key)
            g, q = jr.normal(kg, (n, rank)), jnp.linalg.qr(jr.normal(kq, (12, rank)))[0]
            state, frame = state
            turn = node(q.T @ frame)
            step, state = tx.update(node(g), state, None, turn=turn)
            return (state, q), jnp.sqrt(jnp.mean(step.left**2))

        start = tx.init(node(jnp.zeros((n, rank)))), jnp.zeros((12, rank))
        return jax.lax.scan(body, start, keys)[1][20:]

    kept, lost = (np.asarray(jax.jit(sizes, static_argnums=0)(c)) for c in (True, False))
    # tr V = rank · 1, of an average of 1/(1 − b2) gradients with n rows each.
    np.testing.assert_allclose(kept.mean(), 1, rtol=0.1)
    assert lost.mean() > 1.7 * kept.mean()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("order", ["jacobi", "alternating", "greedy"])
def test_lora_starts_and_surplus_columns_are_safe(getkey, dtype, eps, order):
    target = with_spectrum(getkey(), 8, 6, [1.0, 0.1])
    right = jr.normal(getkey(), (6, 4), dtype)
    starts = {
        "zero": lrjax.LowRank(jnp.zeros((8, 4), dtype), right),
        "both zero": lrjax.LowRank(jnp.zeros((8, 4), dtype), jnp.zeros((6, 4), dtype)),
        "surplus": lrjax.LowRank(
            jnp.ones((8, 4), dtype), right.at[:, 2:].set(right[:, :2])
        ),
    }
    phis = (
        optax.trace(0.9),
        lrjax.scale_by_matrix_adam(eps=eps),
        lrjax.scale_by_matrix_adam(eps=eps, conserve=False),
    )

    @jax.jit
    def run(starts):
        ends = []
        for phi in phis:
            tx = lrjax.scale_by_gram(order=order, phi=phi)

            def body(carry, _, tx=tx):
                x, state = carry
                wide = jax.tree.map(lambda a: a.astype(jnp.float32), x)
                g = jax.tree.map(lambda a: a.astype(dtype), gradient(wide, target))
                updates, state = tx.update(g, state, x)
                updates = jax.tree.map(lambda u: jnp.asarray(-0.01 * u, dtype), updates)
                return (optax.apply_updates(x, updates), state), updates

            for x in starts.values():
                ends.append(jax.lax.scan(body, (x, tx.init(x)), length=5))
        return ends

    assert all_finite(run(starts))


def test_state_is_that_of_adam_and_small_matrices():
    x = {"w": random_low_rank(jr.key(0), 64, 48, 4), "bias": jnp.zeros(9)}
    tx = lrjax.scale_by_gram(phi=lrjax.scale_by_matrix_adam())
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    # Momentum and frame of each factor, its second moment, and two step counts.
    assert count(tx.init(x)) == 2 * (64 + 48) * 4 + 2 * 4 * 4 + 2


def test_moments_that_cannot_turn_are_refused():
    x = random_low_rank(jr.key(0), 5, 4, 2)
    with pytest.raises(ValueError, match=r"elementwise second moments.*matrix_adam"):
        lrjax.scale_by_gram(phi=optax.scale_by_adam()).init(x)
    with pytest.raises(ValueError, match=r"no lrjax.LowRank node"):
        lrjax.scale_by_matrix_adam().init({"w": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match=r"scale_by_matrix_adam needs b2 >= 0, got -1"):
        lrjax.scale_by_matrix_adam(b2=-1.0)
