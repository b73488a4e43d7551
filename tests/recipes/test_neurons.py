"""Optimizers that tell outputs from inputs: Dion, Dion2, Dion3, NorMuon, Muon."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax
from lrjax import subspaces as sub
from tests.helpers import assert_close, random_low_rank


every_matrix = lambda path, shape: len(shape) >= 2
RECIPES = {
    "dion": lambda **more: lrjax.dion(-1.0, 3, weight_decay=0.0, **more),
    "dion2": lambda **more: lrjax.dion2(-1.0, 0.3, weight_decay=0.0, **more),
    "dion3": lambda **more: lrjax.dion3(-1.0, 0.3, weight_decay=0.0, **more),
    "normuon": lambda **more: lrjax.normuon(-1.0, weight_decay=0.0, **more),
    "muon": lambda **more: lrjax.muon(-1.0, weight_decay=0.0, **more),
}
every = pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)


def updates_of(tx, grads):
    """The updates of all steps: directions, at a learning rate of minus one."""

    @jax.jit
    def run(grads):
        first = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
        step = lambda state, g: tx.update(g, state, first)[::-1]
        return jax.lax.scan(step, tx.init(first), grads)

    state, updates = run(grads)
    return updates, state


@pytest.mark.slow_but("muon")
@every
def test_a_kernel_of_flax_moves_as_its_transpose(make, getkey):
    """Its outputs are columns, those of an attention kernel two axes."""
    g = jr.normal(getkey(), (3, 12, 8))
    flat, _ = updates_of(make(), {"weight": g})
    kernels = {
        "linear": {"kernel": g.mT},
        "query": {"kernel": g.mT.reshape(3, 8, 3, 4)},
        "out": {"kernel": g.mT.reshape(3, 2, 4, 12)},
    }
    for name, kernel in kernels.items():  # each alone: Dion's first Q is that of its place
        (got,) = jax.tree.leaves(updates_of(make(), {name: kernel})[0])
        assert_close(got.reshape(3, 8, 12).mT, flat["weight"], condition=1e3)


@pytest.mark.slow_but("muon")
@every
def test_the_right_factor_moves_as_the_matrix_that_it_stands_for(make, getkey):
    """``A (r, n)`` has r outputs, and a node holds ``Aᵀ``."""
    b, a = jr.normal(getkey(), (3, 64, 8)), jr.normal(getkey(), (3, 8, 32))
    # Each alone: Dion's first Q is that of the place of a leaf.
    got, _ = updates_of(make(), {"left": b})
    assert_close(got["left"], updates_of(make(), {"b": b})[0]["b"], condition=1e3)
    got, _ = updates_of(make(), {"right": a.mT})
    assert_close(got["right"].mT, updates_of(make(), {"a": a})[0]["a"], condition=1e3)


@pytest.mark.slow
def test_muon_on_factors_has_the_scales_of_their_own_layout(getkey):
    """``√max(1, outputs/inputs)``: 4 for B (64, 4), and 1 for A (4, 32)."""
    node = random_low_rank(getkey(), 64, 32, 4)
    tx = lrjax.muon(-1.0)
    step, _ = tx.update({"a": node}, tx.init({"a": node}), {"a": node})
    ones = jnp.ones(4)
    values = lambda x: jnp.linalg.svd(x, compute_uv=False)
    assert_close(values(step["a"].left), 4 * ones, condition=100)
    assert_close(values(step["a"].right), ones, condition=100)


@pytest.mark.slow
def test_muon_on_factors_is_that_of_optax_with_its_axes_named(getkey):
    """Without them optax takes B and A for ``(in, out)``: scales 1 and 2.83.

    Its look-ahead corrects the bias of momentum and gradient apart, as Nadam does; that of
    Muon's authors, and ours, does not.
    """
    b, a = jr.normal(getkey(), (3, 64, 4)), jr.normal(getkey(), (3, 4, 32))
    bias = jr.normal(getkey(), (3, 5))
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    exact = {"ns_steps": 30, "ns_coeffs": (2.0, -1.5, 0.5), "nesterov": False}

    def theirs(grads, **more):
        return updates_of(optax.contrib.muon(-1.0, **exact, **more), grads)[0]

    factors = {"left": b, "right": a.mT}
    ours = lrjax.muon(-1.0, nesterov=False)
    got, _ = updates_of(ours, {**factors, "bias": bias})
    named = {"left": numbers, "right": numbers, "bias": None}
    plain = {"left": b, "right": a, "bias": bias}
    want = theirs(plain, muon_weight_dimension_numbers=named)
    assert_close(got["left"], want["left"], rtol=1e-3)
    assert_close(got["right"].mT, want["right"], rtol=1e-3)
    assert_close(got["bias"], want["bias"], rtol=1e-5)
    trapped = theirs({"left": b, "right": a})
    assert_close(4 * trapped["left"], got["left"], rtol=1e-3)
    assert_close(trapped["right"], 8**0.5 * got["right"].mT, rtol=1e-3)


@pytest.mark.slow
def test_dion_on_factors_comes_to_muon(getkey):
    """At full rank nothing is compressed: a constant momentum has one polar factor."""
    left, right = jr.normal(getkey(), (64, 8)), jr.normal(getkey(), (32, 8))
    grads = {"left": left, "right": right}
    steps = jax.tree.map(lambda g: jnp.broadcast_to(g, (60, *g.shape)), grads)
    for normalize in ("columns", "qr"):
        dion = lrjax.dion(-1.0, 8, momentum=1.0, weight_decay=0.0, normalize=normalize)
        got, _ = updates_of(dion, steps)
        muon, _ = updates_of(lrjax.muon(-1.0), steps)
        last = jax.tree.map(lambda x: x[-1], (got, muon))
        assert_close(last[0]["left"], last[1]["left"], rtol=1e-2)
        # Dion has √(r/n) where Muon has √max(1, r/n).
        assert_close(last[0]["right"], (8 / 32) ** 0.5 * last[1]["right"], rtol=1e-2)


@pytest.mark.slow_but("dion")
@every
def test_the_axes_that_a_user_names_are_taken_at_their_word(make, getkey):
    g = jr.normal(getkey(), (3, 12, 8))
    spec = sub.MatrixSpec(rows=(-2,), cols=(-1,))
    got, _ = updates_of(make(where=lambda path, shape: spec), {"kernel": g})
    want, _ = updates_of(make(where=every_matrix), {"weight": g})
    assert_close(got["kernel"], want["weight"])


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "count"), [((7, 10), 3), ((10, 7), 3)])
def test_dion2_moves_some_rows_of_the_short_side_orthogonally(shape, count, getkey):
    g = jr.normal(getkey(), (4, *shape))
    updates, _ = updates_of(RECIPES["dion2"](where=every_matrix), g)
    short = updates if shape[0] < shape[1] else updates.mT
    moved = jnp.any(short != 0, axis=-1)
    assert jnp.all(jnp.sum(moved, axis=-1) == count)
    gain = shape[0] / shape[1]  # the square of that of one singular value
    assert_close(short @ short.mT, gain * jax.vmap(jnp.diag)(1.0 * moved), condition=10)
    # Rows of one size take turns: one that was used has lost some of its momentum.
    signs = jnp.broadcast_to(jnp.sign(g[0]), (3, *shape))
    turns, _ = updates_of(RECIPES["dion2"](where=every_matrix), signs)
    turns = turns if shape[0] < shape[1] else turns.mT
    assert jnp.all(jnp.any(turns != 0, axis=(0, 2)))


def test_without_momentum_nothing_is_lost_and_nothing_comes_twice(getkey):
    """The gradients are what was orthogonalized and what still waits."""
    g = jr.normal(getkey(), (5, 8, 12))

    def look(updates, state, params=None):
        del params
        return updates, (*state[1:], updates)

    spy = optax.GradientTransformation(lambda p: (p,) * 5, look)
    tx = lrjax.project_updates(
        spy,
        sub.SelectedRows(3, choice="topk_l1"),
        schedule=sub.Always(),
        feedback=sub.ErrorFeedback(b1=0.0),
        where=every_matrix,
    )
    updates, state = updates_of(tx, g)
    assert_close(jnp.sum(updates, axis=0) + state.error, jnp.sum(g, axis=0), condition=10)


def test_with_all_rows_dion2_is_muon(getkey):
    g = jr.normal(getkey(), (4, 8, 12))
    got, _ = updates_of(lrjax.dion2(-1.0, 1.0, weight_decay=0.0, where=every_matrix), g)
    muon = optax.chain(optax.trace(0.95), lrjax.orthogonalize_updates(where=every_matrix))
    assert_close(got, (8 / 12) ** 0.5 * updates_of(muon, g)[0], condition=100)


def test_with_all_rows_dion3_is_normuon_at_another_scale(getkey):
    g = jr.normal(getkey(), (4, 8, 12))
    got, _ = updates_of(lrjax.dion3(-1.0, 1.0, weight_decay=0.0, where=every_matrix), g)
    want, _ = updates_of(RECIPES["normuon"](where=every_matrix), g)
    norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    assert_close(got / norm(got), want / norm(want), condition=100)
    assert_close(norm(want), jnp.full((4, 1, 1), 0.2 * 96**0.5), condition=10)


def test_dion3_chooses_no_more_outputs_than_inputs(getkey):
    g = jr.normal(getkey(), (2, 40, 8))
    updates, _ = updates_of(lrjax.dion3(1.0, 0.5, where=every_matrix), g)
    assert jnp.all(jnp.sum(jnp.any(updates != 0, axis=-1), axis=-1) == 8)


def test_rows_get_one_size_and_a_row_that_rests_keeps_its_own(getkey):
    """Averages start at zero: after k visits a row of size one has one of 1 − b2ᵏ."""
    rows = jnp.array([[1.0, 1, 1, 1], [1.0, 0, 1, 0], [1.0, 0, 0, 0]])
    noise = jr.normal(getkey(), (3, 4, 64))
    u = noise / jnp.sqrt(jnp.mean(noise**2, axis=-1, keepdims=True)) * rows[..., None]
    tx = lrjax.normalize_rows(0.5, 0.0, where=every_matrix)
    got, state = updates_of(tx, u)
    squares = state.squares[:, 0]
    assert_close(squares, jnp.array([0.875, 0.5, 0.75, 0.5]), condition=10)
    norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1))
    assert_close(norm(got), norm(u), condition=10)
    plain, _ = updates_of(lrjax.normalize_rows(0.0, 0.0, where=every_matrix), noise)
    sizes = jnp.linalg.norm(plain, axis=-1)
    assert_close(sizes, jnp.broadcast_to(sizes[:, :1], sizes.shape), condition=10)


@pytest.mark.parametrize("recipe", [lrjax.dion2, lrjax.dion3])
@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_is_one(recipe, fraction):
    with pytest.raises(ValueError, match=rf"fraction must be in \(0, 1\], got {fraction}"):
        recipe(0.1, fraction)
