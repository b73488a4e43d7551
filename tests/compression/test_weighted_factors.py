"""One fit, and the published ones that are settings of it, in float64."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import compression
from tests.helpers import all_finite, assert_close, relative_error
from tests.reference import compression as reference


TIGHT = 1e-11  # float64, on second moments of condition 1e2


def weighted_factors(weight, inputs=None, outputs=None, **settings):
    """Of arrays of NumPy too."""
    arrays = (None if x is None else jnp.asarray(x) for x in (weight, inputs, outputs))
    return compression.weighted_factors(*arrays, **settings)


def drawn(getkey, m=7, n=9, count=60):
    """A weight, inputs of unequal directions and a mean, and their second moment."""
    root = jr.normal(getkey(), (n, n)) * jnp.linspace(1, 0.2, n)[None]
    inputs = jr.normal(getkey(), (count, n)) @ root + jr.normal(getkey(), (n,))[None]
    weight = jr.normal(getkey(), (m, n))
    return np.asarray(weight), np.asarray(inputs), inputs.T @ inputs / count


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_one_formula_for_outputs_and_eigenspaces(shape, x64, getkey):
    """V Vᵀ W of the outputs is the SVD of W C^½ taken back, and the tail is the error."""
    weight, inputs, moment = drawn(getkey, *shape)
    found = weighted_factors(weight, moment)
    for rank in range(1, min(shape) + 1):
        got = np.asarray(found.cut(rank).materialize())
        by_outputs = reference.output_space(weight, inputs, rank)
        by_inputs, tail = reference.eigenspace_correction(weight, inputs, rank)
        assert relative_error(got, by_outputs) < TIGHT
        assert relative_error(got, by_inputs) < TIGHT
        mean_square = np.mean(np.sum((inputs @ (weight - got).T) ** 2, axis=1))
        size = float(jnp.sum(found.values**2))
        assert abs(mean_square - tail) < TIGHT * size
        assert abs(float(jnp.sum(found.values[rank:] ** 2)) - tail) < TIGHT * size


def test_of_a_residual_it_is_the_best_correction(x64, getkey):
    weight, inputs, moment = drawn(getkey)
    rough = np.round(2 * weight) / 2
    found = weighted_factors(weight - rough, moment).cut(3).materialize()
    want, tail = reference.eigenspace_correction(weight - rough, inputs, 3)
    assert relative_error(found, want) < TIGHT
    left = np.mean(np.sum((inputs @ (weight - rough - found).T) ** 2, axis=1))
    assert abs(left - tail) < TIGHT * np.mean(np.sum(inputs**2, axis=1))


def test_projections_are_those_of_outputs_and_inputs(x64, getkey):
    """As wide as the narrower of the two, whichever that is."""
    weight, inputs, moment = drawn(getkey)
    found = weighted_factors(weight, moment, project_inputs=True)
    for of_outputs, of_inputs in ((3, 3), (2, 5), (6, 4)):
        got = found.cut(of_outputs, of_inputs)
        assert got.rank == min(of_outputs, of_inputs)
        want = reference.utilized(weight, inputs, of_outputs, of_inputs)
        assert relative_error(got.materialize(), want) < TIGHT


def test_with_gradients_no_matrix_of_the_rank_is_better(x64, getkey):
    """The mean of (gᵀ E x)² is the tail; and no step from it at the same rank lowers it."""
    weight, inputs, moment = drawn(getkey)
    gradients = np.asarray(jr.normal(getkey(), (40, 7)) * jnp.linspace(2, 0.1, 7)[None])
    metric = gradients.T @ gradients / len(gradients)
    found = weighted_factors(weight, moment, metric)
    pair = found.cut(3)
    error = lambda x: reference.two_sided_error(weight - x, inputs, gradients)
    least = error(np.asarray(pair.materialize()))
    whole = float(jnp.sum(found.values**2))
    assert abs(least - float(jnp.sum(found.values[3:] ** 2))) < TIGHT * whole
    for size in (1e-3, 1e-1, 1.0):
        left, right = (
            x + size * jr.normal(getkey(), x.shape) for x in (pair.left, pair.right)
        )
        assert error(np.asarray(left @ right.T)) > least
    plain = lrjax.truncate(jnp.asarray(weight), 3).materialize()
    assert error(np.asarray(plain)) > least


def test_one_hot_inputs_by_their_frequencies(x64, getkey):
    """A diagonal does what the whole matrix does, entries that never occur included."""
    weight = jr.normal(getkey(), (5, 8))
    often = jnp.array([4.0, 0.0, 1.0, 3.0, 0.0, 2.0, 1.0, 1.0]) / 12
    thin, whole = weighted_factors(weight, often), weighted_factors(weight, jnp.diag(often))
    assert_close(thin.values, whole.values, rtol=TIGHT)
    for rank in (1, 3, 5):
        assert_close(
            thin.cut(rank).materialize(), whole.cut(rank).materialize(), rtol=TIGHT
        )
    assert_close(thin.cut(5).materialize(), weight, rtol=TIGHT)


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_full_rank_is_exact_though_inputs_lie_in_a_subspace(shape, getkey):
    """With a little damping; and without any nothing is lost of what was seen."""
    m, n = shape
    weight = jr.normal(getkey(), shape)
    seen = jr.normal(getkey(), (30, 2)) @ jr.normal(getkey(), (2, n))
    moment = seen.T @ seen / 30
    whole = weighted_factors(weight, moment, damping=1e-2).cut(min(m, n)).materialize()
    assert_close(whole, weight, condition=100)
    two = weighted_factors(weight, moment).cut(2).materialize()
    assert_close(seen @ two.T, seen @ weight.T, condition=1e3)


def test_zero_data_zero_weights_and_half_precision_are_finite(getkey):
    weight = jr.normal(getkey(), (5, 6))
    nothing, gradients = jnp.zeros((6, 6)), jnp.zeros((5, 5))
    for w in (weight, 0 * weight, weight.astype(jnp.bfloat16)):
        for damping in (0.0, 1e-2):
            found = weighted_factors(w, nothing, gradients, damping=damping)
            assert all_finite(found.cut(2))
            assert found.left.dtype == jnp.float32


def test_stacks_jit_and_vmap_are_the_single_ones(getkey):
    weight = jr.normal(getkey(), (3, 4, 6))
    root = jr.normal(getkey(), (3, 9, 6))
    moment = root.mT @ root
    materialize = lambda w, c: weighted_factors(w, c, damping=1e-2).cut(2).materialize()
    want = jnp.stack([materialize(w, c) for w, c in zip(weight, moment, strict=True)])
    for got in (
        materialize(weight, moment),
        jax.jit(materialize)(weight, moment),
        jax.vmap(materialize)(weight, moment),
    ):
        assert_close(got, want, condition=1e4)
    sweep = lambda damping: weighted_factors(weight[0], moment[0], damping=damping).values
    dampings = jnp.array([0.0, 0.1, 1.0])
    want = jnp.stack([sweep(damping) for damping in dampings])
    assert_close(jax.vmap(sweep)(dampings), want, condition=100)


def test_columns_of_both_factors_have_one_length(getkey):
    pair = weighted_factors(jr.normal(getkey(), (5, 7)), jnp.eye(7)).cut(3)
    lengths = [jnp.sum(x**2, axis=0) for x in (pair.left, pair.right)]
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
