"""One fit, and the published ones that are settings of it, in float64."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import compression
from tests.helpers import all_finite, assert_close, relative_error
from tests.reference import compression as reference


TIGHT = 1e-11  # float64, on second moments of condition 1e2


def weighted_factors(weight, inputs=None, outputs=None, **settings):
    """Of arrays of NumPy too."""
    arrays = (None if x is None else jnp.asarray(x) for x in (weight, inputs, outputs))
    return compression.weighted_factors(*arrays, **settings)


def rng_of(getkey):
    return np.random.default_rng(np.asarray(jr.key_data(getkey())))


def drawn(getkey, m=7, n=9, count=60):
    """A weight, inputs of unequal directions and a mean, and their second moment."""
    normal = rng_of(getkey).standard_normal
    root = normal((n, n)) * np.linspace(1, 0.2, n)
    inputs = normal((count, n)) @ root + normal(n)
    return normal((m, n)), inputs, inputs.T @ inputs / count


@functools.partial(jax.jit, static_argnames="ranks")
def values_and_cuts(weight, inputs, outputs=None, *, ranks, damping=0.0):
    """The weighed singular values, and the product of the first terms at some ranks."""
    found = weighted_factors(weight, inputs, outputs, damping=damping)
    return found.values, [found.cut(rank).materialize() for rank in ranks]


@pytest.mark.slow_but("shape0")
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_one_formula_for_outputs_and_eigenspaces(shape, x64, getkey):
    """V Vᵀ W of the outputs is the SVD of W C^½ taken back, and the tail is the error."""
    weight, inputs, moment = drawn(getkey, *shape)
    ranks = tuple(range(1, min(shape) + 1))
    values, cuts = jax.tree.map(np.asarray, values_and_cuts(weight, moment, ranks=ranks))
    for rank, got in zip(ranks, cuts, strict=True):
        by_outputs = reference.output_space(weight, inputs, rank)
        by_inputs, tail = reference.eigenspace_correction(weight, inputs, rank)
        assert relative_error(got, by_outputs) < TIGHT
        assert relative_error(got, by_inputs) < TIGHT
        mean_square = np.mean(np.sum((inputs @ (weight - got).T) ** 2, axis=1))
        size = np.sum(values**2)
        assert abs(mean_square - tail) < TIGHT * size
        assert abs(np.sum(values[rank:] ** 2) - tail) < TIGHT * size


def test_of_a_residual_it_is_the_best_correction(x64, getkey):
    weight, inputs, moment = drawn(getkey)
    rough = np.round(2 * weight) / 2
    _, (found,) = values_and_cuts(weight - rough, moment, ranks=(3,))
    want, tail = reference.eigenspace_correction(weight - rough, inputs, 3)
    assert relative_error(found, want) < TIGHT
    left = np.mean(np.sum((inputs @ (weight - rough - found).T) ** 2, axis=1))
    assert abs(left - tail) < TIGHT * np.mean(np.sum(inputs**2, axis=1))


def test_projections_are_those_of_outputs_and_inputs(x64, getkey):
    """As wide as the narrower of the two, whichever that is."""
    weight, inputs, moment = drawn(getkey)
    sizes = ((3, 3), (2, 5), (6, 4))

    @jax.jit
    def cut(weight, moment):
        found = weighted_factors(weight, moment, project_inputs=True)
        return [found.cut(*size) for size in sizes]

    cuts = cut(weight, moment)
    for (of_outputs, of_inputs), got in zip(sizes, cuts, strict=True):
        assert got.rank == min(of_outputs, of_inputs)
        want = reference.utilized(weight, inputs, of_outputs, of_inputs)
        assert relative_error(got.materialize(), want) < TIGHT


def test_with_gradients_no_matrix_of_the_rank_is_better(x64, getkey):
    """The mean of (gᵀ E x)² is the tail; and no step from it at the same rank lowers it."""
    weight, inputs, moment = drawn(getkey)
    rng = rng_of(getkey)
    gradients = rng.standard_normal((40, 7)) * np.linspace(2, 0.1, 7)
    metric = gradients.T @ gradients / len(gradients)

    @jax.jit
    def fit(weight, moment, metric):
        found = weighted_factors(weight, moment, metric)
        return found.values, found.cut(3)

    values, pair = jax.tree.map(np.asarray, fit(weight, moment, metric))
    error = lambda x: reference.two_sided_error(weight - x, inputs, gradients)
    least = error(pair.left @ pair.right.T)
    assert abs(least - np.sum(values[3:] ** 2)) < TIGHT * np.sum(values**2)
    for size in (1e-3, 1e-1, 1.0):
        left, right = (
            x + size * rng.standard_normal(x.shape) for x in (pair.left, pair.right)
        )
        assert error(left @ right.T) > least
    u, s, vt = np.linalg.svd(weight)
    assert error((u[:, :3] * s[:3]) @ vt[:3]) > least  # the best without any weights


def test_one_hot_inputs_by_their_frequencies(x64, getkey):
    """A diagonal does what the whole matrix does, entries that never occur included."""
    weight = rng_of(getkey).standard_normal((5, 8))
    often = np.array([4.0, 0.0, 1.0, 3.0, 0.0, 2.0, 1.0, 1.0]) / 12
    thin, whole = (
        values_and_cuts(weight, inputs, ranks=(1, 3, 5))
        for inputs in (often, np.diag(often))
    )
    assert_close(thin, whole, rtol=TIGHT)
    assert_close(thin[1][-1], weight, rtol=TIGHT)


@pytest.mark.slow_but("shape0")
@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_full_rank_is_exact_though_inputs_lie_in_a_subspace(shape, getkey):
    """With a little damping; and without any nothing is lost of what was seen."""
    m, n = shape
    rng = rng_of(getkey)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    weight, seen = normal(m, n), normal(30, 2) @ normal(2, n)
    moment, ranks = seen.T @ seen / 30, (2, min(m, n))
    _, (_, whole) = values_and_cuts(weight, moment, damping=1e-2, ranks=ranks)
    assert_close(whole, weight, condition=100)
    _, (two, _) = values_and_cuts(weight, moment, ranks=ranks)
    two = np.asarray(two)
    assert_close(seen @ two.T, seen @ weight.T, condition=1e3)


def test_zero_data_zero_weights_and_half_precision_are_finite(getkey):
    weight = rng_of(getkey).standard_normal((5, 6), np.float32)
    nothing, gradients = np.zeros((6, 6), np.float32), np.zeros((5, 5), np.float32)

    @jax.jit
    def cut(weight, damping):
        return weighted_factors(weight, nothing, gradients, damping=damping).cut(2)

    for w in (weight, 0 * weight, weight.astype(jnp.bfloat16)):
        for damping in (0.0, 1e-2):
            pair = cut(w, damping)
            assert all_finite(pair)
            assert pair.left.dtype == jnp.float32


@pytest.mark.slow
def test_stacks_jit_and_vmap_are_the_single_ones(getkey):
    rng = rng_of(getkey)
    weight = rng.standard_normal((3, 4, 6), np.float32)
    root = rng.standard_normal((3, 9, 6), np.float32)
    moment = root.swapaxes(1, 2) @ root
    materialize = lambda w, c: weighted_factors(w, c, damping=1e-2).cut(2).materialize()
    jitted = jax.jit(materialize)
    want = np.stack([jitted(w, c) for w, c in zip(weight, moment, strict=True)])
    for got in (
        materialize(weight[0], moment[0])[None],
        jitted(weight, moment),
        jax.jit(jax.vmap(materialize))(weight, moment),
    ):
        assert_close(got, want[: len(got)], condition=1e4)
    sweep = lambda damping: weighted_factors(weight[0], moment[0], damping=damping).values
    dampings, single = np.array([0.0, 0.1, 1.0], np.float32), jax.jit(sweep)
    want = np.stack([single(damping) for damping in dampings])
    assert_close(jax.jit(jax.vmap(sweep))(dampings), want, condition=100)


def test_columns_of_both_factors_have_one_length(getkey):
    weight = rng_of(getkey).standard_normal((5, 7), np.float32)
    cut = jax.jit(lambda w: weighted_factors(w, jnp.eye(7)).cut(3))
    lengths = [np.sum(np.square(x), axis=0) for x in jax.tree.leaves(cut(weight))]
    assert_close(*lengths, condition=10)


def test_what_does_not_fit_is_refused():
    weight = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"needs inputs of shape \(4, 4\), got \(3, 3\)"):
        weighted_factors(weight, jnp.eye(3))
    with pytest.raises(ValueError, match=r"needs outputs of shape \(3, 3\), got \(3,\)"):
        weighted_factors(weight, None, jnp.ones(3))
    with pytest.raises(ValueError, match="project_inputs needs the second moment"):
        weighted_factors(weight, jnp.ones(4), project_inputs=True)
    with pytest.raises(ValueError, match="rank between 1 and 3, got 4"):
        weighted_factors(weight).cut(4)
