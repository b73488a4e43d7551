"""The kernels on masked columns: augment, lift, truncate, clamp, tangents, moments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import lowrank
from lrjax.linalg import orthonormalize
from lrjax.lowrank import clamp_spectrum, tail_rank
from tests.helpers import all_finite, assert_close, relative_error


M, N, R = 12, 9, 4
BATCHES = [(), (2, 3)]
# One program for each shape, whatever the ranks and the rules.
augment = jax.jit(lowrank.augment, static_argnames=("width", "method"))
truncate = jax.jit(lowrank.truncate, static_argnums=1)
transport_core = jax.jit(lowrank.transport_core, static_argnames="squared")
brand_update, lift = jax.jit(lowrank.brand_update), jax.jit(lowrank.lift)
project_to_tangent = jax.jit(lowrank.project_to_tangent)
retraction, transport = jax.jit(lowrank.retraction), jax.jit(lowrank.transport)


def svd_form(key, m=M, n=N, r=R, *, batch=(), rank=None, dtype=jnp.float64):
    """Orthonormal outer factors and a full core, of which ``rank`` columns are in use."""
    x = _svd_form(key, m, n, r, batch, dtype)
    return x if rank is None else lrjax.SVDForm(x.left, x.core, x.right, rank)


@functools.partial(jax.jit, static_argnums=range(1, 6))
def _svd_form(key, m, n, r, batch, dtype):
    kl, kc, kr = jr.split(key, 3)
    basis = lambda k, size: orthonormalize(jr.normal(k, (*batch, size, r), dtype))
    core = jr.normal(kc, (*batch, r, r), dtype)
    return lrjax.SVDForm(basis(kl, m), core, basis(kr, n))


@functools.partial(jax.jit, static_argnums=1, static_argnames=("batch", "dtype"))
def directions(key, k, *, batch=(), dtype=jnp.float64):
    kl, kr = jr.split(key)
    return (
        jr.normal(kl, (*batch, M, k), dtype),
        jr.normal(kr, (*batch, N, k), dtype),
    )


def spans(basis, x):
    basis, x = np.asarray(basis), np.asarray(x)
    return relative_error(basis @ (basis.swapaxes(-1, -2) @ x), x) < 1e-13


def transposed(x):
    return np.asarray(x).swapaxes(-1, -2)


@pytest.mark.slow_but("qr-2-batch0")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("method", ["qr", "cholesky"])
def test_augmentation_keeps_the_value_and_spans_the_directions(
    batch, rank, method, getkey, x64
):
    x = svd_form(getkey(), batch=batch, rank=rank)
    left, right = directions(getkey(), 3, batch=batch)
    # Directions far below the size of the basis count as much as any.
    wide = augment(x, 1e-150 * left, right, used=None if rank is None else 2, method=method)
    assert_close(wide.materialize(), x.materialize())
    used = (R if rank is None else rank) + (3 if rank is None else 2)
    assert np.all(np.asarray(wide.rank) == used)
    bases = [np.asarray(b)[..., :used] for b in (wide.left, wide.right)]
    for basis, old, new in zip(bases, (x.left, x.right), (left, right), strict=True):
        assert_close(
            transposed(basis) @ basis, np.broadcast_to(np.eye(used), (*batch, used, used))
        )
        assert spans(basis, old[..., : used - 3] if rank is None else old[..., :rank])
        assert spans(basis, new if rank is None else new[..., :2])
    # What was orthonormal stays where it is, sign included.
    kept = R if rank is None else rank
    assert_close(bases[0][..., :kept], x.left[..., :kept])


def test_columns_out_of_use_do_not_leak(getkey, x64):
    """Zero columns in the middle would get directions that later ones depend on."""
    x = svd_form(getkey(), rank=1)
    left, right = directions(getkey(), R)
    wide = augment(x, left, right, used=2)
    small = lrjax.SVDForm(x.left[:, :1], x.core[:1, :1], x.right[:, :1])
    want = augment(small, left[:, :2], right[:, :2])
    assert_close(wide.left[:, :3], want.left)
    assert_close(wide.core[:3, :3], want.core)


def test_a_basis_that_fills_its_side_is_whole(getkey, x64):
    """Of 4 + 7 columns only nine fit on the right: the value and the span are exact."""
    x = svd_form(getkey())
    left, right = directions(getkey(), 7)
    wide = augment(x, left, right)
    assert wide.left.shape, wide.right.shape == ((M, 11), (N, 11))
    assert_close(wide.materialize(), x.materialize())
    assert spans(wide.left, left)
    assert_close(wide.right[:, :N] @ wide.right[:, :N].T, np.eye(N))
    assert not np.any(wide.right[:, N:])


def test_directions_without_room_are_left_out(getkey, x64):
    x = svd_form(getkey(), rank=2)
    left, right = directions(getkey(), R)
    full = augment(x, left, right, used=2)
    for width in (R, 3):
        cut = augment(x, left, right, used=2, width=width)
        assert int(cut.rank) == width
        assert_close(cut.left, full.left[:, :width])
        assert_close(cut.materialize(), x.materialize())


@pytest.mark.slow
def test_one_program_serves_every_rank(getkey, x64):
    x = svd_form(getkey())
    left, right = directions(getkey(), R)
    traces = 0

    def run(rank, used):
        nonlocal traces
        traces += 1
        y = lrjax.SVDForm(x.left, x.core, x.right, rank)
        return augment(y, left, right, used=used)

    ranks = jnp.array(list(itertools.product(range(1, R + 1), range(R + 1))))
    together = jax.jit(jax.vmap(run))(*ranks.T)
    assert traces == 1
    for i, (rank, used) in enumerate(ranks.tolist()):
        y = lrjax.SVDForm(x.left, x.core, x.right, rank)
        alone = augment(y, left, right, used=used)
        total = rank + used
        assert_close(together.left[i, :, :total], alone.left[:, :total], condition=10)
        assert_close(together.core[i], alone.core, condition=10)


def test_sign_fixed_qr_is_idempotent(getkey, x64):
    q = orthonormalize(jr.normal(getkey(), (M, R), jnp.float64))
    assert_close(orthonormalize(q), q)


def test_lift_projects_on_other_bases(getkey, x64):
    x, other = svd_form(getkey(), rank=3), svd_form(getkey())
    left, right = np.asarray(other.left), np.asarray(other.right)
    want = left @ left.T @ np.asarray(x.materialize()) @ right @ right.T
    assert_close(lift(x, other.left, other.right).materialize(), want)


@pytest.mark.slow_but("2")
@pytest.mark.parametrize("rank", [None, 2])
def test_brand_update_is_the_sum(rank, getkey, x64):
    x = svd_form(getkey(), batch=(2,), rank=rank)
    left, right = directions(getkey(), 3, batch=(2,))
    left = left.at[..., 2].set(x.left[..., 0])  # nothing new in one of them
    want = np.asarray(x.materialize()) + np.asarray(left) @ transposed(right)
    got = brand_update(x, left, right)
    assert_close(got.materialize(), want)
    singular = np.linalg.svd(want, compute_uv=False)
    best = truncate(got, tol=0.3)
    error = np.linalg.norm(np.asarray(best.materialize()) - want, axis=(-2, -1))
    for i, kept in enumerate(np.asarray(best.rank)):
        assert_close(error[i], np.linalg.norm(singular[i, kept:]))


@pytest.mark.slow_but("svd-batch0", "svd-batch1")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", ["svd", "pair", "dense"])
def test_truncation_keeps_what_its_rule_says(batch, form, getkey, x64):
    x = svd_form(getkey(), batch=batch, rank=3 if form == "svd" else None)
    values = np.linalg.svd(x.materialize(), compute_uv=False)[..., :R]
    want = np.asarray(x.materialize())
    x = {"svd": x, "pair": x.to_low_rank(), "dense": x.materialize()}[form]
    total = np.linalg.norm(values, axis=-1)
    tails = np.stack([np.linalg.norm(values[..., k:], axis=-1) for k in range(R)], axis=-1)
    for tol in (0.0, 0.1, 0.3, 0.6, 1.0):
        y = truncate(x, R, tol=tol)
        error = np.linalg.norm(np.asarray(y.materialize()) - want, axis=(-2, -1))
        assert np.all(error <= (tol + 1e-14) * total)
        if form != "dense":  # whose other singular values are rounding errors, not zero
            smallest = np.maximum((tails > max(tol, 1e-14) * total[..., None]).sum(-1), 1)
            assert np.array_equal(y.rank, smallest)
        energy = truncate(x, R, energy=1 - tol**2)
        assert np.all(np.abs(np.asarray(energy.rank) - y.rank) <= (tol in (0.0, 1.0)))
    for budget, rank in ((0, 1), (M + N, 1), (3 * (M + N) - 1, 2), (10**6, R)):
        y = truncate(x, R, budget=budget)
        assert np.all(np.asarray(y.rank) == rank)
        best = np.linalg.norm(values[..., rank:], axis=-1)
        error = np.linalg.norm(np.asarray(y.materialize()) - want, axis=(-2, -1))
        np.testing.assert_allclose(error, best, atol=1e-13)


def test_ranks_of_a_sweep_over_tolerances(getkey, x64):
    x = svd_form(getkey())
    values = np.linalg.svd(x.core, compute_uv=False)
    tols = np.array([np.linalg.norm(values[k:]) / np.linalg.norm(values) for k in range(R)])
    traces = 0

    def run(tol):
        nonlocal traces
        traces += 1
        return truncate(x, tol=tol).rank

    assert jax.jit(jax.vmap(run))(tols * 1.001).tolist() == [1, 1, 2, 3]
    assert jax.jit(jax.vmap(run))(tols * 0.999).tolist() == [1, 2, 3, 4]
    assert traces == 2


@pytest.mark.slow_but("None-rms", "3-mean", "3-rms")
@pytest.mark.parametrize("reference", ["mean", "rms"])
@pytest.mark.parametrize("rank", [None, 3])
def test_clamped_spectra_have_the_condition_number(reference, rank, getkey, x64):
    x = svd_form(getkey(), rank=rank)
    used = R if rank is None else rank
    # A zero that is in use is lifted, and does not mix with the columns that are not.
    before = np.array([*(5.0, 3.0, 1.0)[: used - 1], 0.0])
    turn = lambda: jnp.linalg.qr(jr.normal(getkey(), (used, used), jnp.float64))[0]
    core = x.core.at[:used, :used].set(turn() @ jnp.diag(before) @ turn())
    x = lrjax.SVDForm(x.left, core, x.right, rank)
    power = {"mean": 1, "rms": 2}[reference]
    level = np.mean(before**power) ** (1 / power)
    clamp = jax.jit(lambda tau: clamp_spectrum(x, tau, reference=reference))
    for condition in (1.0, 1.1, 2.0):
        y = clamp(condition)
        after = np.linalg.svd(y.core, compute_uv=False)
        low = 2 * level / (condition + 1)
        assert_close(after[:used], np.clip(before, low, condition * low), condition=10)
        assert_close(after[0] / after[used - 1], np.float64(condition), condition=10)
        assert not np.any(after[used:])
        assert_close(y.left, x.left)
    both = jax.tree.map(lambda a: jnp.stack([a, a]), x)
    each = clamp_spectrum(both, jnp.array([1.0, 2.0]), reference=reference)
    assert_close(each.core[1], clamp(2.0).core, condition=100)


@pytest.mark.slow_but("None")
@pytest.mark.parametrize("rank", [None, 2])
def test_tangents_of_masked_columns(rank, getkey, x64):
    x = svd_form(getkey(), rank=rank)
    gradient = jr.normal(getkey(), (M, N), jnp.float64)
    used = R if rank is None else rank
    u, v = np.asarray(x.left)[:, :used], np.asarray(x.right)[:, :used]
    g = np.asarray(gradient)
    want = u @ u.T @ g + g @ v @ v.T - u @ u.T @ g @ v @ v.T
    sides = lambda y: lrjax.LowRank(gradient @ y.right, gradient.T @ y.left)
    dense = lambda y, step: step.left @ y.right.T + y.left @ step.right.T
    step = project_to_tangent(x, sides(x))
    assert_close(dense(x, step), want)
    # Projecting twice is projecting once.
    again = lrjax.LowRank(jnp.asarray(want) @ x.right, jnp.asarray(want).T @ x.left)
    assert_close(dense(x, project_to_tangent(x, again)), want, condition=10)
    # A retraction is the best approximation of the step, at any length.
    moved = retraction(x, step)
    a, s, bt = np.linalg.svd(np.asarray(x.materialize()) + want)
    best = (a[:, :used] * s[:used]) @ bt[:used]
    assert_close(moved.materialize(), best, condition=1e3)
    assert np.all(np.asarray(moved.rank) == used)
    # Transport is projection on the new tangent space.
    new = svd_form(getkey(), rank=rank)
    p, q = np.asarray(new.left)[:, :used], np.asarray(new.right)[:, :used]
    there = p @ p.T @ want + want @ q @ q.T - p @ p.T @ want @ q @ q.T
    assert_close(dense(new, transport(x, step, new)), there, condition=10)


@pytest.mark.slow
def test_the_tangent_space_has_the_dimension_of_the_matrices_of_a_rank(getkey, x64):
    """``r (m + n − r)``, the rank of the Jacobian of (left, core, right) ↦ the product."""
    m, n, r = 6, 5, 2
    x = svd_form(getkey(), m, n, r)
    value = lambda *parts: (parts[0] @ parts[1] @ parts[2].T).ravel()
    blocks = jax.jacobian(value, argnums=(0, 1, 2))(x.left, x.core, x.right)
    jacobian = np.concatenate([np.reshape(b, (m * n, -1)) for b in blocks], axis=1)
    assert np.linalg.matrix_rank(jacobian, tol=1e-10) == r * (m + n - r)
    # And its range is that of the projection.
    project = lambda g: project_to_tangent(x, lrjax.LowRank(g @ x.right, g.T @ x.left))

    def dense(g):
        step = project(g)
        return step.left @ x.right.T + x.left @ step.right.T

    matrix = jax.vmap(dense)(jnp.eye(m * n).reshape(-1, m, n)).reshape(m * n, m * n)
    assert_close(matrix @ matrix, matrix, condition=10)
    assert_close(np.trace(matrix), np.float64(r * (m + n - r)))
    assert_close(matrix @ jacobian, jacobian, condition=10)


@pytest.mark.slow
def test_sides_of_the_gradient_come_from_one_backward_pass(getkey, x64):
    """With ``W = K Vᵀ + U Lᵀ − U S Vᵀ``: ``∂K = G V``, ``∂L = Gᵀ U``, ``∂S = −Uᵀ G V``."""
    x, target = svd_form(getkey()), jr.normal(getkey(), (M, N), jnp.float64)
    loss = lambda w: jnp.sum(jnp.tanh(w) * target)
    u, s, v = x.left, x.core, x.right
    tangent = lambda k, l, s: k @ v.T + u @ l.T - u @ s @ v.T
    at = (u @ s, v @ s.T, s)
    assert_close(tangent(*at), x.materialize())
    got = jax.grad(lambda *p: loss(tangent(*p)), argnums=(0, 1, 2))(*at)
    g = jax.grad(loss)(x.materialize())
    assert_close(got, (g @ v, g.T @ u, -u.T @ g @ v))
    # And from the gradients of the three factors, by dividing the core out.
    plain = jax.grad(lambda y: loss(y.materialize()))(x)
    assert_close(plain.left @ jnp.linalg.inv(s).T, g @ v, condition=1e3)


@pytest.mark.slow_but("3")
@pytest.mark.parametrize("rank", [None, 3])
def test_no_singular_value_is_too_small_for_the_sides_of_the_gradient(rank, getkey):
    """``G V`` from ``G V Sᵀ`` in float32, where S spans twenty orders of magnitude."""
    x = svd_form(getkey(), rank=rank, dtype=jnp.float32)
    core = jnp.diag(jnp.array([1.0, 1e-7, 1e-14, 1e-20]))
    x = lrjax.SVDForm(x.left, core, x.right, rank)
    g = jr.normal(getkey(), (M, N))
    grads = jax.grad(lambda y: jnp.sum(y.materialize() * g))(
        lrjax.SVDForm(x.left, x.masked_core(), x.right)
    )
    got = project_to_tangent(x, grads)
    want = project_to_tangent(x, lrjax.LowRank(g @ x.right, g.T @ x.left))
    assert_close(got, want, condition=10)
    # Columns whose singular value is zero move inside alone: with none at all, nowhere.
    zero = lrjax.SVDForm(x.left, jnp.zeros_like(core), x.right, rank)
    inside = lrjax.SVDForm(jnp.zeros_like(x.left), grads.core, jnp.zeros_like(x.right))
    step = project_to_tangent(zero, inside)
    dense = step.left @ x.right.T + x.left @ step.right.T
    want = lrjax.SVDForm(x.left, grads.core, x.right, rank).materialize()
    assert_close(dense, want, condition=10)


def test_sides_of_the_gradient_from_any_core(getkey, x64):
    x, g = svd_form(getkey()), jr.normal(getkey(), (M, N), jnp.float64)
    values = jnp.array([3.0, 2.0, 1.0, 1e-3])
    turn = lambda: jnp.linalg.qr(jr.normal(getkey(), (R, R), jnp.float64))[0]
    x = lrjax.SVDForm(x.left, (turn() * values[None]) @ turn(), x.right)
    grads = jax.grad(lambda y: jnp.sum(y.materialize() * g))(x)
    want = project_to_tangent(x, lrjax.LowRank(g @ x.right, g.T @ x.left))
    assert_close(project_to_tangent(x, grads), want, condition=1e5)


def test_moments_follow_the_bases(getkey, x64):
    """``left m rightᵀ`` does not change when the bases do, as long as they span it."""
    x = svd_form(getkey(), rank=None)
    wide = augment(x, *directions(getkey(), 3))
    overlaps = wide.left.T @ x.left, wide.right.T @ x.right
    moment = jr.normal(getkey(), (R, R), jnp.float64)
    moved = transport_core(moment, *overlaps)
    dense = lambda y, m: y.left @ m @ y.right.T
    assert_close(dense(wide, moved), dense(x, moment), condition=10)
    # And back.
    back = transport_core(moved, *(c.T for c in overlaps))
    assert_close(back, moment, condition=10)
    second = transport_core(moment**2, *overlaps, squared=True)
    assert_close(second[:R, :R], moment**2, condition=10)
    assert_close(second[R:], np.full((3, R + 3), np.mean(np.square(moment))), condition=10)
    # A rotation of uncorrelated coordinates keeps the sum of their variances.
    turn = jnp.linalg.qr(jr.normal(getkey(), (R, R), jnp.float64))[0]
    turned = transport_core(moment**2, turn, turn, squared=True)
    assert_close(jnp.sum(turned), jnp.sum(moment**2), condition=10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_degenerate_input_stays_finite(dtype, getkey):
    x = svd_form(getkey(), rank=2, dtype=dtype)
    nothing = jnp.zeros((M, 3), dtype), jnp.zeros((N, 3), dtype)

    @jax.jit
    def results(y):
        step = lrjax.LowRank(x.left, x.right)
        return [
            augment(y, *nothing),
            augment(y, *nothing, method="cholesky"),
            augment(y, x.left, x.right, used=2),
            brand_update(y, *nothing),
            truncate(y, tol=0.1),
            clamp_spectrum(y, 2.0),
            project_to_tangent(y, step),
            retraction(y, step),
        ]

    for y in (x, jax.tree.map(jnp.zeros_like, x)):
        found = results(y)
        assert all_finite(found)
        assert all(z.left.dtype == dtype for z in found[:6])
    wide = augment(x, *directions(getkey(), 3, dtype=dtype))
    eps = float(jnp.finfo(dtype).eps)
    assert relative_error(wide.materialize(), x.materialize()) < 5 * eps


def test_rank_of_a_tail():
    values = jnp.array([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert tail_rank(values, 0.0).tolist() == [3, 1]
    assert tail_rank(values, jnp.array([1 / 14, 0.5])).tolist() == [2, 1]
    tiny = tail_rank(1e-30 * values, jnp.array([0.0, 0.5]))  # whose squares underflow
    assert tiny.tolist() == [3, 1]


def test_refusals(getkey):
    x = svd_form(getkey(), dtype=jnp.float32)
    left, right = directions(getkey(), 2, dtype=jnp.float32)
    with pytest.raises(ValueError, match="as many directions on both sides"):
        augment(x, left, right[:, :1])
    with pytest.raises(ValueError, match=r"a width between 1 and 6.*got 7"):
        augment(x, left, right, width=7)
    with pytest.raises(ValueError, match="one of tol, energy and budget, got nothing"):
        truncate(x)
    with pytest.raises(ValueError, match="got tol and energy"):
        truncate(x, tol=0.1, energy=0.9)
    with pytest.raises(ValueError, match="between 1 and the width 4, got 5"):
        truncate(x, 5, tol=0.1)
    with pytest.raises(ValueError, match=r"at least one, got 0\.5"):
        clamp_spectrum(x, 0.5)
