import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from lrjax import subspaces as sub

from ..helpers import assert_close, relative_error, with_spectrum


P, Q, R = 12, 20, 4
anything = lambda path, shape: len(shape) >= 2


def refresh_once(basis, a, key, count=0, state=None, momentum=None):
    """One refresh of a basis outside any optimizer, as a dense matrix."""
    to = sub.RefreshContext(key, jnp.asarray(count, jnp.int32), momentum, R)
    first = state is None
    state = basis.init(a.shape, R, a.dtype, key) if first else state
    state = basis.observe(state, a)
    rule = basis.start if first else basis.refresh
    state = jax.jit(lambda s, a, c: rule(s, a, to._replace(count=c)))(state, a, to.count)
    projector = basis.projector(state, key, a.shape[-2], R, True)
    identity = jnp.broadcast_to(jnp.eye(R), (*a.shape[:-2], R, R))
    return projector.lift(identity), state


def energy(p, a):
    return jnp.sum((p.mT @ a) ** 2) / jnp.sum(a**2)


ORTHONORMAL = {
    "gram_eigh": sub.GramEigh(R),
    "randomized_svd": sub.RandomizedSVD(R),
    "range_finder": sub.RangeFinder(R),
    "power": sub.Power(R),
    "power_blocks": sub.Power(R, blocks=2),
    "random": sub.RandomOrthonormal(R),
    "rows": sub.SelectedRows(R),
    "uniform_rows": sub.SelectedRows(R, choice="uniform"),
    "sampled_svd": sub.SampledSVD(R),
    "geodesic": sub.Geodesic(R, 1e-3),
    "ema_gram": sub.EmaGram(R),
}


@pytest.mark.slow_but("gram_eigh-deficient", "range_finder-full")
@pytest.mark.parametrize("rank", [P, 2], ids=["full", "deficient"])
@pytest.mark.parametrize("basis", ORTHONORMAL.values(), ids=ORTHONORMAL)
def test_bases_are_orthonormal_also_on_rank_deficient_gradients(basis, rank, getkey):
    a = with_spectrum(getkey(), P, Q, jnp.linspace(2.0, 1.0, rank))[None]
    p, state = refresh_once(basis, a, getkey())
    assert basis.orthonormal
    assert_close(p.mT @ p, jnp.eye(R)[None])
    p, _ = refresh_once(basis, a, getkey(), 1, state)
    assert_close(p.mT @ p, jnp.eye(R)[None])


@pytest.mark.slow
def test_the_best_bases_capture_what_the_svd_does(getkey):
    values = jnp.exp(-jnp.arange(P) / 2.0)
    a = with_spectrum(getkey(), P, Q, values)
    best = jnp.sum(values[:R] ** 2) / jnp.sum(values**2)
    for basis in (sub.SVD(R), sub.GramEigh(R), sub.EmaGram(R)):
        assert_close(energy(refresh_once(basis, a, getkey())[0], a), best)
    sketched = energy(refresh_once(sub.RandomizedSVD(R), a, getkey())[0], a)
    assert 0.999 * best < sketched <= best * (1 + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_power_steps_never_lose_energy_and_find_the_dominant_subspace(blocks, getkey, x64):
    values = jnp.exp(-jnp.arange(P, dtype=jnp.float64) / 2.0)
    a = with_spectrum(getkey(), P, Q, values, jnp.float64)
    basis = sub.Power(R, blocks=blocks)
    state = basis.init(a.shape, R, a.dtype, getkey())
    key = getkey()

    def step(state, count):
        state = basis.refresh(state, a, sub.RefreshContext(key, count, None, R))
        return state, energy(state, a)

    _, energies = jax.lax.scan(step, state, jnp.arange(200 * blocks))
    assert jnp.all(jnp.diff(energies) > -1e-12)
    assert energies[0] < (1 - 1e-6) * energies[-1]
    assert_close(energies[-1], jnp.sum(values[:R] ** 2) / jnp.sum(values**2))


def test_blocks_stay_orthonormal_over_thousands_of_noisy_steps(getkey):
    basis = sub.Power(R, blocks=4)
    key = getkey()
    state = basis.init((P, Q), R, jnp.float32, key)

    def step(state, count):
        a = jr.normal(jr.fold_in(key, count), (P, Q))
        return basis.refresh(state, a, sub.RefreshContext(key, count, None, R)), None

    state, _ = jax.lax.scan(step, state, jnp.arange(2000))
    assert_close(state.mT @ state, jnp.eye(R))


@pytest.mark.slow
def test_geodesic_steps_go_downhill_and_stop_at_the_optimum(getkey, x64):
    a = with_spectrum(getkey(), P, Q, jnp.linspace(2.0, 0.5, P), jnp.float64)
    basis = sub.Geodesic(R, 0.02)
    start = jnp.linalg.qr(jr.normal(getkey(), (P, R), jnp.float64))[0]
    energies, p = [energy(start, a)], start
    for count in range(5):
        p, _ = refresh_once(basis, a, getkey(), count, p)
        energies.append(energy(p, a))
    assert jnp.all(jnp.diff(jnp.array(energies)) > 0)
    best = jnp.linalg.svd(a)[0][:, :R]
    assert_close(refresh_once(basis, a, getkey(), 1, best)[0], best, condition=100)


@pytest.mark.slow
def test_oja_with_plain_descent_is_ojas_rule(getkey, x64):
    a = with_spectrum(getkey(), P, Q, jnp.linspace(2.0, 0.5, P), jnp.float64)
    basis = sub.Oja(R, optax.sgd(0.3))
    p = jnp.linalg.qr(jr.normal(getkey(), (P, R), jnp.float64))[0]
    state = basis.init(a.shape, R, a.dtype, getkey())._replace(matrix=p)
    got, _ = refresh_once(basis, a, getkey(), 1, state)
    x = a @ a.T / jnp.sum(a**2)
    assert_close(got, p + 0.6 * (jnp.eye(P) - p @ p.T) @ x @ p)


@pytest.mark.slow
def test_oja_descends_its_loss(getkey, x64):
    a = with_spectrum(getkey(), P, Q, jnp.linspace(2.0, 0.5, P), jnp.float64)
    p = jr.normal(getkey(), (P, R), jnp.float64)
    basis = sub.Oja(R, optax.sgd(1.0), penalty=0.7)
    state = basis.init(a.shape, R, a.dtype, getkey())._replace(matrix=p)
    got, _ = refresh_once(basis, a, getkey(), 1, state)
    unit = a / jnp.linalg.norm(a)

    def loss(p):
        error = p @ (p.T @ unit) - unit
        return jnp.sum(error**2) + 0.7 * jnp.sum((p.T @ p - jnp.eye(R)) ** 2)

    assert_close(got, p - jax.grad(loss)(p))


@pytest.mark.slow
def test_coap_follows_the_momentum_and_recalibrates_to_the_svd(getkey, x64):
    a = with_spectrum(getkey(), P, Q, jnp.linspace(2.0, 0.5, R), jnp.float64)
    basis = sub.CorrelationDescent(R, period=1, recalibrate=3)
    p, _ = refresh_once(basis, a, getkey())
    u = jnp.linalg.svd(a)[0][:, :R]
    assert_close(jnp.abs(u.T @ p), jnp.eye(R), condition=1e3)  # rank r: sketch is exact
    momentum = jr.normal(getkey(), (R, Q), jnp.float64)
    tilted = jnp.linalg.qr(p + 0.3 * jr.normal(getkey(), (P, R), jnp.float64))[0]
    moved, _ = refresh_once(basis, a, getkey(), 1, tilted, momentum)

    def loss(p):
        lifted = p @ momentum
        lengths = jnp.linalg.norm(lifted, axis=0) * jnp.linalg.norm(a, axis=0)
        cosine = jnp.mean(jnp.sum(lifted * a, axis=0) / lengths)
        return jnp.mean((p @ (p.T @ a) - a) ** 2) * (1 - cosine)

    gradient = jax.grad(loss)(tilted)
    clipped = gradient / jnp.maximum(jnp.linalg.norm(gradient), 1)
    assert_close(moved, tilted - 0.1 * clipped, condition=10)
    again, _ = refresh_once(basis, a, getkey(), 3, tilted)
    assert_close(energy(again, a), jnp.asarray(1.0))


@pytest.mark.slow
def test_gaussian_bases_are_unbiased_and_inflate_norms(getkey):
    basis = sub.Gaussian(R)
    key = getkey()
    draw = jax.vmap(lambda e: basis.projector(e, key, P, R, True).matrix)
    p = draw(jnp.arange(4000))
    product = p @ p.mT
    mean, spread = product.mean(0), product.std(0) / 4000**0.5
    assert jnp.all(jnp.abs(mean - jnp.eye(P)) < 6 * spread)
    # ‖P Pᵀ x‖² is (1 + (p + 1)/r) times ‖x‖² on average.
    squares = jnp.sum(product**2, axis=(-2, -1)) / P
    assert abs(squares.mean() - (1 + (P + 1) / R)) < 6 * squares.std() / 4000**0.5
    # A move from one basis to the next, ‖P_newᵀ P_old x‖², inflates by p/r.
    moved = jnp.sum((p[1:].mT @ p[:-1]) ** 2, axis=(-2, -1)) / R
    assert abs(moved.mean() - P / R) < 6 * moved.std() / 4000**0.5


@pytest.mark.slow
def test_sampled_rows_are_unbiased(getkey):
    a = jr.normal(getkey(), (P, Q)) * jnp.arange(1.0, P + 1)[:, None]
    basis = sub.SelectedRows(R, choice="sampled")

    @jax.vmap
    def project(key):
        context = sub.RefreshContext(key, jnp.array(0), None, R)
        state = basis.refresh(basis.init(a.shape, R, a.dtype, key), a, context)
        projector = basis.projector(state, key, P, R, True)
        return projector.lift(projector.project(a))

    draws = project(jr.split(getkey(), 4000))
    error = jnp.abs(draws.mean(0) - a)
    assert jnp.all(error < 6 * draws.std(0) / 4000**0.5)


def test_top_rows_are_the_largest(getkey):
    a = jr.normal(getkey(), (P, Q)) * jnp.arange(1.0, P + 1)[:, None]
    p, state = refresh_once(sub.SelectedRows(R), a, getkey())
    norms = jnp.linalg.norm(a, axis=1)
    assert set(state.index.tolist()) == set(jnp.argsort(norms)[-R:].tolist())
    assert_close(p.mT @ p, jnp.eye(R))


@pytest.mark.slow
def test_sampled_svd_draws_by_singular_value(getkey):
    values = jnp.array([4.0, 2.0, 1.0, 1.0])
    a = with_spectrum(getkey(), 4, 6, values)
    u = jnp.linalg.svd(a)[0]
    basis = sub.SampledSVD(1)
    to = lambda key: sub.RefreshContext(key, jnp.array(0), None, 1)
    draw = jax.vmap(lambda key: basis.refresh(None, a, to(key)))
    picked = jnp.abs(jnp.einsum("pk,spr->sk", u, draw(jr.split(getkey(), 4000)))) > 0.5
    share = picked.mean(0)
    want = values / values.sum()
    assert jnp.all(jnp.abs(share - want)[:2] < 6 * jnp.sqrt(want * (1 - want) / 4000)[:2])


@pytest.mark.slow
def test_align_undoes_flips_and_swaps(getkey):
    """With moments kept, an aligned basis of the same span changes nothing."""
    g = jr.normal(getkey(), (3, 6, 9))
    span = jnp.linalg.qr(jr.normal(getkey(), (6, 2)))[0]

    class Scrambled(sub.MatrixBasis):
        rank: sub.Rank = 2
        side: sub.Side = "left"

        def refresh(self, state, a, context):
            even = context.count % 2 == 0
            return span @ jnp.where(even, jnp.eye(2), jnp.array([[0.0, -1], [1, 0]]))

    def run(basis, carry):
        tx = lrjax.project_updates(
            optax.scale_by_adam(),
            basis,
            schedule=sub.Always(),
            carry=carry,
            where=anything,
        )
        step = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(step, tx.init(g[0]), g)[1]

    want = run(sub.Fixed(span), sub.Keep())
    assert_close(run(Scrambled(), sub.Align()), want, condition=100)
    assert relative_error(run(Scrambled(), sub.Keep()), want) > 0.1


def counter_example(tx, key, steps):
    """Small-batch noise that hides the gradient from the SVD (He et al., 2024)."""
    n, r = 10, 4
    mask = (jnp.arange(n) < n - r).astype(jnp.float32)
    block = jr.normal(key, (n - r, n - r))
    linear = jnp.zeros((n, n)).at[: n - r, : n - r].set(block / jnp.linalg.norm(block))
    noise = jnp.diag(1 - mask)
    gradient = lambda x: mask[:, None] * x + linear

    def step(carry, key):
        x, state = carry
        sign = jnp.where(jr.bernoulli(key), 1.0, -1.0)
        updates, state = tx.update(gradient(x) + 1.6 * sign * noise, state, x)
        return (x + updates, state), None

    x = mask[:, None] * mask[None]
    carry, _ = jax.lax.scan(step, (x, tx.init(x)), jr.split(key, steps))
    return jnp.linalg.norm(gradient(carry[0]))


@pytest.mark.slow
def test_noise_stalls_the_svd_and_not_the_default():
    def run(recipe, **kwargs):
        rate = optax.cosine_decay_schedule(3e-3, 8000)
        tx = recipe(rate, 4, where=anything, **kwargs)
        keys = jr.split(jr.key(0), 5)
        return jax.jit(jax.vmap(lambda key: counter_example(tx, key, 8000)))(keys)

    assert jnp.all(run(lrjax.galore, refresh_every=20, scale=1.0) > 1)
    assert jnp.all(run(lrjax.subspace_adam) < 0.1)


def test_random_subspaces_do_not_stall():
    """Projected descent itself, without an inner state."""
    tx = optax.chain(
        lrjax.project_updates(
            optax.identity(),
            sub.RandomOrthonormal(4),
            schedule=sub.Periodic(20),
            where=anything,
        ),
        optax.scale(-3e-3),
    )
    keys = jr.split(jr.key(0), 5)
    ends = jax.jit(jax.vmap(lambda key: counter_example(tx, key, 8000)))(keys)
    assert jnp.all(ends < 0.1)


@pytest.mark.parametrize(
    ("tx", "elements"),
    [
        (lambda: lrjax.galore(1.0, 4, side="long"), 4 * 24 + 2 * 4 * 16),
        (lambda: lrjax.apollo(1.0, 1, over="tensor"), 2 * 24 + 2),
        (lambda: lrjax.dion(1.0, 4), 16 * 24 + 24 * 4),
    ],
)
@pytest.mark.parametrize("upright", [False, True])
def test_state_bytes_of_the_other_sides_and_ranks(tx, elements, upright):
    shape = (24, 16) if upright else (16, 24)
    if elements == 16 * 24 + 24 * 4 and upright:
        elements = 16 * 24 + 16 * 4  # Dion's Q belongs to the columns
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    report = lrjax.metrics.memory_report(params, tx())
    flags = 0 if report.leaves[0].state_bytes % 4 == 0 else 1
    assert report.leaves[0].state_bytes == 4 * elements + flags
    assert report.adam_bytes == 4 * (2 * 16 * 24 + 1)
    assert report.shared_bytes <= 8


def test_the_ratio_of_a_seven_billion_parameter_model():
    h, i, layers = 4096, 11008, 32
    shape = lambda *s: jax.ShapeDtypeStruct((layers, *s), jnp.float32)
    params = {"attention": [shape(h, h)] * 4, "mlp": [shape(h, i)] * 3}
    report = lrjax.metrics.memory_report(params, lrjax.galore(1e-2, rank=1024))
    assert round(report.ratio, 4) == 0.3225
    assert "0.323 of Adam's" in str(report)
