import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import subspaces as sub

from ..helpers import all_finite, assert_close, relative_error


anything = lambda path, shape: len(shape) >= 2
ADAM = optax.scale_by_adam()


def wrap(inner, basis, **kwargs):
    return lrjax.project_updates(inner, basis, **{"where": anything, **kwargs})


FULL_RANK = {
    "gram_eigh": sub.GramEigh(6),
    "power_blocks": sub.Power(6, blocks=3),
    "rows": sub.SelectedRows(6),
}


@pytest.mark.slow
@pytest.mark.parametrize("basis", FULL_RANK.values(), ids=FULL_RANK)
def test_a_full_rank_basis_changes_nothing_without_an_inner_state(
    basis, rollout, noisy, getkey
):
    g = {"wide": noisy(getkey(), 4, 6, 9), "tall": noisy(getkey(), 4, 9, 6)}
    got, _ = rollout(wrap(optax.identity(), basis, schedule=sub.Always()), g)
    assert_close(got, g)


@pytest.mark.slow
def test_rotated_momentum_is_full_momentum_at_full_rank(rollout, noisy, getkey, x64):
    g = noisy(getkey(), 8, 6, 9, dtype=jnp.float64)
    inner, key = optax.trace(0.9), getkey()
    want, _ = rollout(inner, g)
    make = lambda carry: wrap(
        inner, sub.RandomOrthonormal(6), schedule=sub.Always(), carry=carry, key=key
    )
    got, _ = rollout(make(sub.Rotate()), g)
    assert_close(got, want)
    kept, _ = rollout(make(sub.Keep()), g)
    assert relative_error(kept, want) > 0.1


def test_rotated_variance_turns_with_signed_permutations(rollout, noisy, getkey, x64):
    """Adam commutes with a signed permutation of the coordinates, and so must v."""
    g = noisy(getkey(), 6, 5, 7, dtype=jnp.float64)
    want, _ = rollout(ADAM, g)

    class Permuted(sub.MatrixBasis):
        rank: sub.Rank = 5
        side: sub.Side = "left"

        def refresh(self, state, a, context):
            shift = jnp.roll(jnp.eye(5, dtype=a.dtype), context.count, axis=1)
            signs = jnp.where(jnp.arange(5) % 2 == context.count % 2, -1.0, 1.0)
            return shift * signs[None]

    carry = sub.RotateVariance(0.9, 0.999)
    got, _ = rollout(wrap(ADAM, Permuted(), schedule=sub.Always(), carry=carry), g)
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "basis",
    [
        sub.SVD(3),
        sub.RandomizedSVD(3),
        sub.Power(3, blocks=2),
        sub.Gaussian(3),
        sub.SelectedRows(3, choice="sampled"),
        sub.SampledSVD(3),
    ],
    ids=lambda basis: type(basis).__name__,
)
def test_stacked_leaves_are_the_loop_over_their_members(basis, rollout, noisy, getkey):
    g = jnp.stack([noisy(getkey(), 4, 6, 9) for _ in range(2)], axis=1)
    lift = sub.ScaledResidual() if basis.orthonormal else sub.Project()
    settings = {"schedule": sub.Periodic(2), "carry": sub.RotateVariance(), "lift": lift}
    tx = wrap(ADAM, basis, key=getkey(), **settings)
    got, _ = rollout(tx, g)
    # The same gradients upright, one by one: every basis serves both sides alike.
    upright = jax.jit(lambda g: rollout(tx, g.mT)[0].mT)
    want = jnp.stack([upright(g[:, i]) for i in (0, 1)], axis=1)
    assert_close(got, want, condition=1e3)


@pytest.mark.slow
def test_fira_is_plain_projection_at_full_rank(rollout, noisy, getkey, x64):
    g = noisy(getkey(), 4, 5, 8, dtype=jnp.float64)
    lifts = sub.ScaledResidual(), sub.Project()
    got, want = (rollout(wrap(ADAM, sub.SVD(5), lift=l), g)[0] for l in lifts)
    assert relative_error(got, want) < 1e-7  # a norm from a difference of squares


@pytest.mark.slow
def test_a_column_outside_the_basis_is_scaled_like_the_others(getkey):
    """Adam makes a unit step of any projection, even of one of rounding size."""
    p = jnp.linalg.qr(jr.normal(getkey(), (6, 6)))[0]
    g = jr.normal(getkey(), (6, 4))
    outside = p[:, 2:] @ jr.normal(getkey(), (4,))
    g = g.at[:, 1].set(outside).at[:, 3].set(0.0)
    tx = wrap(ADAM, sub.Fixed(p[:, :2]), lift=sub.ScaledResidual())
    step = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
    got = step(g)
    r = p[:, :2].T @ g[:, ::2]
    whole = 2 / jnp.linalg.norm(r)  # two columns of two signs each
    left_out = lambda x: x - p[:, :2] @ (p[:, :2].T @ x)
    assert_close(left_out(got[:, 1]), outside * whole, condition=10)
    assert not got[:, 3].any()
    alone = jnp.zeros_like(g).at[:, 1].set(outside)
    assert jnp.max(jnp.abs(step(alone))) < 2  # a step of Adam in the subspace at most


def test_apollo_with_the_identity_scales_columns_like_adam(rollout, noisy, getkey):
    g = noisy(getkey(), 3, 6, 9)
    adam, _ = rollout(ADAM, g)
    lift = sub.ScaledGradient(max_growth=None)
    got, _ = rollout(wrap(ADAM, sub.Fixed(jnp.eye(6)), lift=lift), g)
    norms = lambda x: jnp.linalg.norm(x, axis=-2, keepdims=True)
    assert_close(got, g * norms(adam) / norms(g))


def test_seeded_reset_keeps_the_step_size_that_a_zero_reset_blows_up(rollout):
    g = jnp.ones((30, 4, 4))
    make = lambda carry: wrap(
        ADAM,
        sub.Fixed(jnp.eye(4)),
        schedule=sub.Periodic(20, stagger=False),
        carry=carry,
    )
    seeded, _ = rollout(make(sub.SeededReset()), g)
    assert_close(seeded, g, rtol=1e-5)
    zeroed, _ = rollout(make(sub.Reset()), g)
    # From zero moments after t steps of Adam the next update is
    # (1−b1)(1−b2ᵗ⁺¹)^½ / ((1−b1ᵗ⁺¹)(1−b2)^½).
    t = 21
    want = 0.1 * (1 - 0.999**t) ** 0.5 / ((1 - 0.9**t) * 0.001**0.5)
    assert_close(zeroed[20, 0, 0], jnp.asarray(want), rtol=1e-4)
    assert zeroed[20, 0, 0] < zeroed[25, 0, 0]


@pytest.mark.slow
def test_galore_matches_optax_within_a_period(rollout, noisy, getkey):
    g = {"wide": noisy(getkey(), 5, 16, 24), "tall": noisy(getkey(), 5, 24, 16)}
    ours = wrap(ADAM, sub.SVD(4, side="long"))
    theirs = optax.contrib.scale_by_galore(rank=4, update_proj_gap=200)
    (got, mine), (want, other) = rollout(ours, g), rollout(theirs, g)
    assert_close(got, want, condition=100)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(mine.inner) == shapes(other.base_optimizer_state)


def test_galore_matches_optax_across_refreshes_of_tall_matrices(rollout, noisy, getkey):
    g = noisy(getkey(), 6, 24, 16)
    ours = wrap(ADAM, sub.SVD(4, side="long"), schedule=sub.Periodic(2))
    theirs = optax.contrib.scale_by_galore(rank=4, update_proj_gap=2)
    assert_close(rollout(ours, g)[0], rollout(theirs, g)[0], condition=100)


@pytest.mark.slow
def test_zero_and_non_finite_gradients_never_enter_a_basis(getkey):
    tx = wrap(ADAM, sub.Power(2), schedule=sub.Always(), carry=sub.RotateVariance())
    params = jnp.zeros((3, 6, 8))
    update = jax.jit(tx.update)
    state = tx.init(params)
    g = jr.normal(getkey(), params.shape).at[0].set(0.0)
    _, first = update(g, state)
    assert_close(first.basis[0], state.basis[0])
    bad = g.at[1, 0, 0].set(jnp.nan).at[2, 0, 0].set(jnp.inf)
    _, second = update(bad, first)
    assert_close(second.basis[1:], first.basis[1:])
    assert not np.array_equal(first.basis[1:], state.basis[1:])


def test_a_refresh_without_a_gradient_waits_for_the_next_one(getkey):
    """An expert without tokens on the scheduled step, at the start and later on."""
    tx = wrap(ADAM, sub.SVD(2), schedule=sub.Periodic(3))
    g = jr.normal(getkey(), (8, 2, 6, 9))
    g = g.at[jnp.array([0, 3, 4]), 0].set(0.0)
    leading = lambda t, member: jnp.linalg.svd(g[t, member])[0][:, :2]
    update, state = jax.jit(tx.update), tx.init(g[0])
    # Which gradient the basis is from: member 0 is refreshed by those of 1 and 5.
    found_at = [None, 1, 1, 1, 1, 5, 6, 6], [0, 0, 0, 3, 3, 3, 6, 6]
    for t in range(8):
        _, state = update(g[t], state)
        for member in (0, 1):
            if found_at[member][t] is not None:
                want = leading(found_at[member][t], member)
                assert_close(state.basis[member], want, condition=10)
        waiting = [t in (0, 3, 4), False]
        np.testing.assert_array_equal(state.waiting, waiting)


@pytest.mark.slow
def test_a_zero_gradient_gives_a_zero_update():
    lifts = sub.Project, sub.ScaledResidual, sub.ScaledGradient, sub.SignResidual
    for lift in lifts:
        tx = wrap(ADAM, sub.Power(2), schedule=sub.Always(), lift=lift())
        g = jnp.zeros((6, 8))
        updates, state = tx.update(g, tx.init(g))
        assert all_finite((updates, state))
        assert not jnp.any(updates)


@pytest.mark.slow
def test_trees_of_all_kinds(getkey):
    params = {
        "a": jnp.zeros((6, 8)),
        "bf16": jnp.zeros((8, 6), jnp.bfloat16),
        "none": None,
        "scalar": jnp.zeros(()),
        "stack": {"w": jnp.zeros((2, 3, 6, 8))},
        "vector": jnp.zeros((5,)),
    }
    grads = jax.tree.map(lambda p: jr.normal(getkey(), p.shape, jnp.bfloat16), params)
    tx = wrap(ADAM, sub.Power(2), schedule=sub.Periodic(2), carry=sub.RotateVariance())
    state = tx.init(params)
    for _ in range(2):
        updates, new = jax.jit(tx.update)(grads, state)
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert types(new) == types(state)
        assert types(updates) == types(grads)
        state = new
    assert all(x.size > 0 for x in jax.tree.leaves(state))
    assert all_finite(updates)
    empty = wrap(ADAM, sub.Power(2))
    assert empty.update({}, empty.init({}))[0] == {}


@pytest.mark.slow
def test_views_of_convolution_kernels(getkey):
    kernel = jr.normal(getkey(), (8, 4, 3, 3))
    spec = sub.MatrixSpec(rows=(0,), cols=(1, 2, 3))
    tx = wrap(ADAM, sub.SVD(3), where=lambda path, shape: spec)
    got, state = tx.update(kernel, tx.init(kernel))
    flat = kernel.reshape(8, 36)
    plain = wrap(ADAM, sub.SVD(3))
    assert state.inner.mu.shape == (3, 36)
    assert_close(got, plain.update(flat, plain.init(flat))[0].reshape(kernel.shape))
    swapped = sub.MatrixSpec(rows=(3, 1), cols=(0,))
    tx = wrap(ADAM, sub.SVD(3), where=lambda path, shape: swapped)
    moved = kernel.transpose(2, 3, 1, 0).reshape(3, 12, 8)
    want = plain.update(moved, plain.init(moved))[0]
    want = want.reshape(3, 3, 4, 8).transpose(3, 2, 0, 1)
    assert_close(tx.update(kernel, tx.init(kernel))[0], want)


@pytest.mark.slow
def test_vmap_over_learning_rate_and_seed_is_the_loop(noisy, getkey):
    g = noisy(getkey(), 4, 6, 9)

    def train(rate, seed):
        tx = optax.chain(
            wrap(
                ADAM,
                sub.Power(2, blocks=2),
                schedule=sub.Periodic(2),
                carry=sub.RotateVariance(),
                lift=sub.ScaledResidual(),
                key=jr.key(seed),
            ),
            optax.scale_by_learning_rate(rate),
        )
        params = jnp.zeros((6, 9))

        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g + params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), g)[0][0]

    rates, seeds = jnp.array([0.1, 0.01, 0.3]), jnp.arange(3)
    got = jax.jit(jax.vmap(train))(rates, seeds)
    one = jax.jit(train)
    want = jnp.stack([one(r, s) for r, s in zip(rates, seeds, strict=True)])
    assert_close(got, want, condition=100)


def _primitives(jaxpr, inside_cond=False):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside_cond
        for value in eqn.params.values():
            inner = value if isinstance(value, tuple | list) else (value,)
            for j in inner:
                j = getattr(j, "jaxpr", j)
                if hasattr(j, "eqns"):
                    deeper = inside_cond or eqn.primitive.name == "cond"
                    yield from _primitives(j, deeper)


FACTORIZATIONS = {"svd", "geqrf", "householder_product", "qr", "cholesky", "eigh"}


@pytest.mark.slow_but("svd")
@pytest.mark.parametrize("basis", [sub.SVD(2), sub.Power(2)], ids=["svd", "power"])
def test_a_vmapped_schedule_stays_a_branch(basis):
    tx = wrap(ADAM, basis, schedule=sub.Periodic(5), carry=sub.RotateVariance())
    g = jnp.ones((8, 6, 9))
    state = jax.vmap(tx.init)(g)
    jaxpr = jax.make_jaxpr(jax.vmap(tx.update))(g, state).jaxpr
    found = [p for p in _primitives(jaxpr) if p[0] in FACTORIZATIONS]
    assert found
    assert all(inside for _, inside in found)


def test_the_default_factorizes_small_matrices_alone():
    tx = lrjax.subspace_adam(1e-3, 4, where=anything)
    g = jnp.ones((20, 30))
    jaxpr = jax.make_jaxpr(tx.update)(g, tx.init(g), g).jaxpr
    assert {name for name, _ in _primitives(jaxpr)} & FACTORIZATIONS == {"cholesky"}


def test_an_external_schedule_compiles_no_decomposition_until_asked(getkey):
    tx = optax.chain(wrap(ADAM, sub.SVD(2), schedule=sub.OnRequest()), optax.scale(-1.0))
    g = jr.normal(getkey(), (6, 9))
    state = tx.init(g)
    jaxpr = jax.make_jaxpr(tx.update)(g, state).jaxpr
    assert not [p for p in _primitives(jaxpr) if p[0] in FACTORIZATIONS]
    basis = lambda state: state[0].basis
    _, same = tx.update(g, state)
    assert_close(basis(same), basis(state))
    _, moved = tx.update(g, state, refresh=True)
    assert_close(basis(moved), jnp.linalg.svd(g)[0][:, :2])
    traced = jax.jit(lambda flag: tx.update(g, state, refresh=flag)[1])
    assert_close(basis(traced(True)), basis(moved))
    assert_close(basis(traced(False)), basis(state))


def test_after_use_means_that_no_gradient_defines_its_own_basis(noisy, getkey):
    g = noisy(getkey(), 2, 6, 9)
    tx = wrap(optax.identity(), sub.SVD(2), schedule=sub.Always(when="after"))
    _, state = tx.update(g[0], tx.init(g[0]))
    updates, _ = tx.update(g[1], state)
    p = jnp.linalg.svd(g[0])[0][:, :2]
    assert_close(updates, p @ (p.T @ g[1]))


@pytest.mark.slow
def test_staggered_leaves_refresh_on_different_steps(getkey):
    g = {str(i): jr.normal(getkey(), (4, 6)) for i in range(4)}
    tx = wrap(ADAM, sub.RandomOrthonormal(2), schedule=sub.Periodic(4))
    update = jax.jit(tx.update)
    _, state = update(g, tx.init(g))
    moved = []
    for _ in range(4):
        _, new = update(g, state)
        changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), new.basis, state.basis)
        moved.append([name for name in g if changed[name]])
        state = new
    assert moved == [["3"], ["2"], ["1"], ["0"]]


@pytest.mark.slow
def test_adaptive_gaps_grow_while_the_subspace_rests(getkey):
    g = jr.normal(getkey(), (4, 6))
    schedule = sub.Adaptive(1, window=2)
    tx = wrap(ADAM, sub.SVD(2), schedule=schedule)
    update, state = jax.jit(tx.update), tx.init(g)
    gaps = []
    for _ in range(8):
        _, state = update(g, state)
        gaps.append(int(state.schedule.gap))
    # Refreshes at 0, 1, 2 fill the window; from then on each one doubles the gap.
    assert gaps == [1, 1, 2, 2, 4, 4, 4, 4]
    tx = wrap(ADAM, sub.RandomOrthonormal(1), schedule=sub.Adaptive(1, threshold=0.99))
    update, state = jax.jit(tx.update), tx.init(g)
    for _ in range(8):
        _, state = update(g, state)
    assert state.schedule.gap == 1


def turning(overlap, compare, steps=5):
    """The gap after refreshes whose bases have this overlap with the ones before."""
    schedule = sub.Adaptive(1, window=2, threshold=0.9, compare=compare)
    state = schedule.init(())
    for count in range(steps):
        when = sub.ScheduleContext(jnp.asarray(count), 0, 1)
        state = schedule.observe(state, overlap, when)
    return int(state.gap)


def test_adaptive_may_compare_spans_in_place_of_first_vectors():
    """Columns that turn among themselves rest as a span; one that leaves it moves it."""
    swap = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    assert turning(swap, "span") == 8
    assert turning(swap, "first") == 1
    left = jnp.diag(jnp.array([1.0, 0.0]))  # half of the span has gone
    assert turning(left, "span") == 1
    assert turning(left, "first") == 8
    # cos² of 18.4 degrees is 0.9: the mean over both.
    angles = jnp.array([0.3, 0.34])
    assert abs(float(jnp.mean(jnp.cos(angles) ** 2)) - 0.9) < 0.01
    assert turning(jnp.diag(jnp.cos(angles)), "span") == 8
    assert turning(jnp.diag(jnp.cos(1.1 * angles)), "span") == 1


def test_adaptive_refuses_another_comparison(shapes_unchecked):
    with pytest.raises(
        ValueError, match="'first' vectors of two bases or their whole 'span'"
    ):
        sub.Adaptive(1, compare="all")


def test_the_inner_transform_sees_one_tree(getkey):
    """Global norms and masks inside work on projected and other leaves together."""
    g = {"m": jr.normal(getkey(), (6, 9)), "v": jr.normal(getkey(), (5,))}
    inner = optax.chain(
        optax.clip_by_global_norm(1e-3), optax.masked(ADAM, {"m": True, "v": False})
    )
    tx = wrap(inner, sub.SVD(2), carry=sub.RotateVariance(), schedule=sub.Periodic(1))
    updates, state = tx.update(g, tx.init(g))
    updates, state = tx.update(g, state)
    p = jnp.linalg.svd(g["m"])[0][:, :2]
    size = jnp.sqrt(jnp.sum((p.T @ g["m"]) ** 2) + jnp.sum(g["v"] ** 2))
    assert_close(updates["v"], g["v"] * 1e-3 / size)


BAD = [
    (lambda: wrap(ADAM, sub.Gaussian(2), lift=sub.ScaledResidual()), "orthonormal basis"),
    (
        lambda: wrap(ADAM, sub.Gaussian(2), feedback=sub.ErrorFeedback()),
        "orthonormal basis",
    ),
    (
        lambda: wrap(ADAM, sub.SVD(2), where=sub.is_hidden_matrix).init(
            {"a": {"b": jnp.ones(3)}}
        ),
        r"where= of project_updates chose none of a\.b: ",
    ),
    (lambda: wrap(ADAM, sub.SVD(1.5)).init(jnp.ones((4, 5))), "fraction"),
    (lambda: wrap(ADAM, sub.SVD(0)).init(jnp.ones((4, 5))), "positive int"),
    (
        lambda: wrap(ADAM, sub.SVD(1), where=lambda *_: True).init({"b": jnp.ones(3)}),
        r"chose b of shape \(3,\)",
    ),
    (
        lambda: wrap(optax.scale_by_sm3(), sub.SVD(1), carry=sub.Rotate()).init(
            jnp.ones((4, 5))
        ),
        r"ScaleBySM3State\.nu",
    ),
    (lambda: wrap(ADAM, sub.Fixed(jnp.eye(3))).init(jnp.ones((4, 5))), "3 rows"),
    (
        lambda: wrap(ADAM, sub.SVD(1), where=lambda *_: sub.MatrixSpec((0,), (0,))).init(
            jnp.ones((4, 5))
        ),
        "different axes",
    ),
    (lambda: sub.Periodic(0), "at least one step"),
    (lambda: sub.Power(2, blocks=0), "blocks >= 1"),
    (lambda: sub.Switch(sub.SelectedRows(2), sub.SVD(2), at=1), "basis matrix itself"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_mistakes_are_named(make, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        make()
