import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import extend_basis
from lrjax.lowrank import (
    TuckerForm,
    higher_order_svd,
    tucker_augment,
    tucker_tangent,
    tucker_truncate,
)
from tests.helpers import all_finite, assert_close, relative_error, tol
from tests.reference import tucker_training as reference


# One program each in place of many small ones.
augment = jax.jit(tucker_augment)
truncate = jax.jit(tucker_truncate, static_argnames=("ranks", "widths"))
value = jax.jit(lambda x: x.materialize())
SHAPE, WIDTHS = (7, 6, 5), (3, 3, 2)


@functools.partial(jax.jit, static_argnames=("widths", "shape", "batch"))
def orthonormal_form(key, widths=WIDTHS, ranks=None, shape=SHAPE, batch=()):
    """Random bases and a random core, in the default dtype."""
    keys = jr.split(key, len(shape) + 1)
    bases = [
        jnp.linalg.qr(jr.normal(k, (*batch, n, w)))[0]
        for k, n, w in zip(keys[1:], shape, widths, strict=True)
    ]
    return TuckerForm(jr.normal(keys[0], (*batch, *widths)), bases, ranks)


def cut(x):
    """The same form with arrays of the shapes that its ranks say, in NumPy."""
    ranks = np.asarray(x.active)
    core = np.asarray(x.core)[tuple(slice(r) for r in ranks)]
    return core, [np.asarray(u)[:, :r] for u, r in zip(x.factors, ranks, strict=True)]


def loss(dense, target):
    """A smooth function whose gradient is tanh of the difference."""
    return jnp.sum(jnp.logaddexp(dense - target, target - dense))


def train(x, target, rate, level):
    """One step: bases from the gradient of the factors, a step of the core, truncation."""
    slope = jax.grad(lambda x: loss(value(x), target), allow_int=True)(x)
    wide = tucker_augment(x, slope.factors)
    slope = jax.grad(
        lambda core: loss(TuckerForm(core, wide.factors, wide.active).materialize(), target)
    )(wide.core)
    moved = TuckerForm(wide.core - rate * slope, wide.factors, wide.active)
    return tucker_truncate(moved, tol=level, widths=x.widths)


def assert_orthonormal(x):
    """The columns in use are; those behind them are zero or orthogonal to them."""
    for u, rank in zip(x.factors, np.asarray(x.ranks), strict=True):
        gram = np.asarray(u).T @ np.asarray(u)
        want = np.diag(np.where(np.arange(len(gram)) < rank, 1, np.diag(gram)))
        np.testing.assert_allclose(gram, want, atol=tol(u))


@pytest.mark.slow
def test_masked_columns_do_not_count(getkey):
    x = orthonormal_form(getkey(), ranks=(2, 3, 1))
    core, bases = cut(x)
    assert_close(value(x), reference.value(core, bases))
    assert x.ranks.tolist() == [2, 3, 1]
    assert x.widths == WIDTHS
    both = orthonormal_form(getkey(), batch=(2,), ranks=jnp.array([[2, 3, 1], [1, 1, 2]]))
    for k in range(2):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], both)
        assert_close(value(both)[k], reference.value(*cut(one)))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, (2, 3, 1), (1, 1, 1)])
def test_augmentation_keeps_the_value_and_holds_the_directions(getkey, ranks, x64):
    x = orthonormal_form(getkey(), ranks=ranks)
    directions = [1e-9 * jr.normal(getkey(), (n, 2)) for n in SHAPE]
    wide = augment(x, directions)
    assert wide.widths == (5, 5, 4)
    assert_close(value(wide), value(x))
    assert_orthonormal(wide)
    used = x.widths if ranks is None else ranks
    for axis, (u, d) in enumerate(zip(wide.factors, directions, strict=True)):
        kept = np.asarray(d)[:, : used[axis]]
        if ranks is not None:
            assert int(wide.ranks[axis]) == used[axis] + kept.shape[1]
        basis = np.asarray(u)[:, : wide.ranks[axis]]
        assert relative_error(basis @ (basis.T @ kept), kept) < tol(u)
        old = np.asarray(x.factors[axis])[:, : used[axis]]
        assert_close(basis[:, : used[axis]], old)  # the old columns come first, unturned


def test_an_axis_without_directions_stays(getkey):
    x = orthonormal_form(getkey(), ranks=(2, 2, 2))
    wide = augment(x, (None, jr.normal(getkey(), (6, 3)), None))
    assert wide.widths == (3, 6, 2)
    assert wide.ranks.tolist() == [2, 4, 2]
    np.testing.assert_array_equal(wide.factors[0], x.factors[0])
    assert_close(value(wide), value(x))


@pytest.mark.slow
def test_bases_that_fill_the_space_stop_growing(getkey, x64):
    """Twice the rank is more than the axis is long: all of it, and the value stays."""
    x = orthonormal_form(getkey(), widths=(5, 4, 4), ranks=(4, 4, 3))
    wide = augment(x, [jr.normal(getkey(), u.shape) for u in x.factors])
    assert wide.widths == SHAPE
    assert wide.ranks.tolist() == [7, 6, 5]
    assert_close(value(wide), value(x))
    assert_orthonormal(wide)


@pytest.mark.parametrize("kind", ["zero", "inside", "one column"])
def test_dependent_directions_give_a_basis_all_the_same(getkey, kind):
    x = orthonormal_form(getkey(), ranks=(2, 2, 1))
    directions = [jr.normal(getkey(), u.shape) for u in x.factors]
    if kind == "zero":
        directions = [0 * d for d in directions]
    if kind == "inside":
        directions = list(x.factors)
    if kind == "one column":
        directions = [d[:, :1] * jnp.ones((1, d.shape[1])) for d in directions]
    wide = augment(x, directions)
    assert_orthonormal(wide)
    assert_close(value(wide), value(x), condition=10)


@pytest.mark.slow
def test_a_zero_column_amid_the_basis_leaks_nothing(getkey, x64):
    """QR of [U · mask | D] without packing turns the later columns towards any vector."""
    u = jnp.linalg.qr(jr.normal(getkey(), (8, 4)))[0]
    d = jr.normal(getkey(), (8, 4))
    wide = extend_basis(u, d, active=jnp.array(2), used=jnp.array(2))
    want = np.linalg.qr(np.hstack([u[:, :2], d[:, :2]]))[0]
    got = np.asarray(wide)[:, :4]
    assert_close(got @ got.T, want @ want.T, condition=100)


@pytest.mark.slow
def test_sandwich_of_the_truncation(getkey, x64):
    """Its squared error is between the largest and the sum of the squared tails."""
    x = orthonormal_form(getkey(), widths=(4, 4, 4))
    for ranks in ((3, 2, 3), (1, 2, 2), (4, 4, 1)):
        small = truncate(x, ranks)
        assert small.widths == ranks
        assert_orthonormal(small)
        dense = np.asarray(value(x))
        tails = [
            np.sum(np.linalg.svd(reference.unfolded(dense, k), compute_uv=False)[r:] ** 2)
            for k, r in enumerate(ranks)
        ]
        error = np.sum((np.asarray(value(small)) - dense) ** 2)
        assert max(tails) * (1 - 1e-10) <= error <= sum(tails) * (1 + 1e-10)
        # The same on the dense tensor: the core holds all that the decomposition needs.
        want = higher_order_svd(value(x), ranks).materialize()
        assert_close(value(small), want, condition=1e6)


@pytest.mark.parametrize("level", [0.05, 0.3, 0.6])
def test_a_tolerance_keeps_the_fewest_that_it_allows(getkey, level, x64):
    x = orthonormal_form(getkey(), widths=(4, 4, 4), ranks=(4, 3, 4))
    small = truncate(x, tol=level)
    core, bases = cut(x)
    want, wanted_bases = reference.truncated(core, bases, level, (4, 4, 4))
    assert tuple(small.ranks.tolist()) == want.shape
    assert_close(value(small), reference.value(want, wanted_bases), condition=100)
    error = relative_error(value(small), value(x))
    assert error <= level * np.sqrt(3) * (1 + 1e-10)
    by_energy = truncate(x, energy=1 - level**2)
    assert_close(value(by_energy), value(small))


def test_a_tolerance_for_each_axis_and_narrower_widths(getkey):
    x = orthonormal_form(getkey(), widths=(4, 4, 4))
    small = truncate(x, tol=jnp.array([0.0, 2.0, 0.0]), widths=(3, 4, 4))
    assert small.ranks.tolist() == [3, 1, 4]
    assert small.widths == (3, 4, 4)
    assert truncate(x, tol=0.0).ranks.tolist() == [4, 4, 4]


def test_core_after_truncation_is_all_orthogonal(getkey, x64):
    core = np.asarray(truncate(orthonormal_form(getkey()), tol=0.0).core)
    for axis in range(3):
        rows = reference.unfolded(core, axis)
        gram = rows @ rows.T
        assert_close(gram, np.diag(np.diag(gram)))
        assert np.all(np.diff(np.diag(gram)) <= 0)


@pytest.mark.slow
@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-12])
def test_one_step_is_exact(getkey, smallest, x64):
    """At rate one on ½‖W − T‖², from any start, however small its singular values."""
    x = orthonormal_form(getkey())
    scale = jnp.linspace(1, smallest, 3)[:, None, None]
    x = TuckerForm(x.core * scale, x.factors)
    target = orthonormal_form(getkey()).materialize()
    distance = lambda core, u: (
        jnp.sum((TuckerForm(core, u).materialize() - target) ** 2) / 2
    )
    slopes = jax.jit(jax.grad(distance, (0, 1)))
    wide = augment(x, slopes(x.core, x.factors)[1])
    core = wide.core - slopes(wide.core, wide.factors)[0]
    new = truncate(TuckerForm(core, wide.factors), WIDTHS)
    assert relative_error(value(new), target) < 1e-13 / min(1, smallest**0.25)


@pytest.mark.slow
def test_masked_ranks_are_those_of_arrays_that_change_shape(getkey, x64):
    """Thirty steps, for several tolerances at once, in one program."""
    target = 3 * jr.normal(getkey(), SHAPE)
    start = orthonormal_form(getkey(), widths=(6, 6, 5), ranks=(2, 2, 2))
    levels, rate = jnp.array([0.02, 0.2, 0.4]), 0.3
    step = jax.jit(jax.vmap(train, (0, None, None, 0)))
    x = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(levels)), start)
    gradient = lambda w: np.tanh(w - np.asarray(target))
    others = [cut(start) for _ in levels]
    seen = set()
    for _ in range(30):
        x = step(x, target, rate, levels)
        for k, level in enumerate(np.asarray(levels)):
            others[k] = reference.step(*others[k], gradient, rate, level, (6, 6, 5))
            assert tuple(x.ranks[k].tolist()) == others[k][0].shape
        seen |= {tuple(ranks) for ranks in x.ranks.tolist()}
    assert len(seen) > 3
    assert step._cache_size() == 1
    for k, (core, bases) in enumerate(others):
        got = jax.tree.map(lambda leaf, k=k: leaf[k], x).materialize()
        assert relative_error(got, reference.value(core, bases)) < 1e-11


@pytest.mark.slow_but("ranks2")
@pytest.mark.parametrize("ranks", [None, (2, 3, 2), (1, 1, 1)])
def test_tangent_is_the_projection_on_the_derivatives(getkey, ranks, x64):
    x = orthonormal_form(getkey(), ranks=ranks)
    gradient = jr.normal(getkey(), SHAPE)

    @jax.jit
    def tangent(x):
        of = lambda c, u: jnp.sum(TuckerForm(c, u, x.active).materialize() * gradient)
        slope = TuckerForm(*jax.grad(of, (0, 1))(x.core, x.factors))
        return tucker_tangent(x, slope)

    got = tangent(x)
    parts = cut(x) if ranks else (np.asarray(x.core), [np.asarray(u) for u in x.factors])
    want = reference.tangent_projection(*parts, np.asarray(gradient))
    assert_close(value(got), want, condition=1e5)


@pytest.mark.slow
def test_zero_and_bfloat16(getkey):
    x = orthonormal_form(getkey(), ranks=(2, 2, 2))
    zero = TuckerForm(0 * x.core, x.factors, x.active)
    small = truncate(augment(zero, x.factors), tol=0.1, widths=WIDTHS)
    assert all_finite(small)
    assert small.ranks.tolist() == [1, 1, 1]
    rough = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x.core, x.factors))
    rough = TuckerForm(*rough, x.active)
    wide = augment(rough, rough.factors)
    back = truncate(wide, tol=0.0, widths=WIDTHS)
    assert back.dtype == jnp.bfloat16
    assert relative_error(value(back), value(x)) < 0.1


def test_refuses(getkey):
    x = orthonormal_form(getkey())
    with pytest.raises(TypeError, match="ranks must be integers"):
        TuckerForm(x.core, x.factors, 1.5)
    with pytest.raises(ValueError, match="for each factor"):
        tucker_augment(x, x.factors[:2])
    with pytest.raises(ValueError, match="for each factor"):
        tucker_augment(x, (x.factors[1], None, None))
    with pytest.raises(ValueError, match="one rule"):
        tucker_truncate(x)
    with pytest.raises(ValueError, match="one rule"):
        tucker_truncate(x, (1, 1, 1), tol=0.1)
    with pytest.raises(ValueError, match="one rule"):
        tucker_truncate(x, (1, 1, 1), widths=(2, 2, 2))
    with pytest.raises(ValueError, match=r"between 1 and \(3, 3, 2\), got \(4, 1, 1\)"):
        tucker_truncate(x, (4, 1, 1))
