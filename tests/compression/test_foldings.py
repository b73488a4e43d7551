import itertools
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.compression import Folding, folded_factors, minimax_foldings
from lrjax.lowrank import minimax_ranks
from lrjax.nn import fold_kernel, unfold_matrix


SCHEMES = ("inputs", "outputs", "first", "last")


@jax.jit
def weights(key):
    """A convolution and a linear layer, of falling spectra."""
    a, b = jr.split(key)
    kernel = jr.normal(a, (6, 4, 3, 2)) * jnp.logspace(0, -2, 4)[None, :, None, None]
    return {
        "conv": kernel,
        "linear": jr.normal(b, (5, 8)) @ jnp.diag(jnp.logspace(0, -2, 8)),
    }


factors = jax.jit(folded_factors, static_argnums=1)


def folded(weight, scheme):
    return np.asarray(
        fold_kernel(weight, scheme) if weight.ndim > 2 else weight, np.float64
    )


def blocks(weight, scheme, groups):
    """The columns in groups, side by side."""
    return np.stack(np.split(folded(weight, scheme), groups, axis=1))


def cost_and_error(weight, folding):
    """From the factors themselves, by the definition."""
    if folding is None:
        return weight.size, 0.0
    pair = factors(weight, folding)
    parts = blocks(weight, folding.scheme, folding.groups)
    left = parts - np.asarray(pair.left) @ np.asarray(pair.right.mT)
    norm = np.linalg.norm(folded(weight, folding.scheme), 2)
    return pair.left.size + pair.right.size, np.linalg.norm(left, 2, (1, 2)).max() / norm


def costs_and_errors(weight, scheme, groups):
    """Those of the best factors of every rank: what the first singular values leave."""
    parts = blocks(weight, scheme, groups)
    values = np.linalg.svd(parts, compute_uv=False).max(axis=0)
    errors = np.append(values[1:], 0) / np.linalg.norm(folded(weight, scheme), 2)
    each = groups * sum(parts.shape[1:])
    return [((r + 1) * each, error) for r, error in enumerate(errors)]


@pytest.mark.slow
def test_no_other_choice_within_the_budget_has_a_smaller_largest_error(getkey):
    layers = weights(getkey())
    choices = {}
    for path, weight in layers.items():
        own = SCHEMES if weight.ndim > 2 else SCHEMES[:1]
        options = [
            one
            for scheme, k in itertools.product(own, (1, 2))
            for one in costs_and_errors(weight, scheme, k)
        ]
        choices[path] = [(weight.size, 0.0), *options]
    before = math.inf
    for budget in (40, 60, 80, 120, 190):
        found = minimax_foldings(layers, budget, groups=(1, 2))
        chosen = [cost_and_error(w, found.get(path)) for path, w in layers.items()]
        assert sum(cost for cost, _ in chosen) <= budget
        error = max(error for _, error in chosen)
        best = min(
            max(e for _, e in pick)
            for pick in itertools.product(*choices.values())
            if sum(c for c, _ in pick) <= budget
        )
        assert error <= best + 1e-5
        assert error <= before + 1e-6
        before = error
    assert found == {}  # 144 + 40 numbers fit as they are


def test_one_scheme_and_one_group_is_a_cut_at_equal_relative_error(getkey):
    layers = weights(getkey())
    matrices = {path: folded(w, "inputs") for path, w in layers.items()}
    spectra = {path: np.linalg.svd(m, compute_uv=False) for path, m in matrices.items()}
    shapes = {path: m.shape for path, m in matrices.items()}
    for budget in (50, 80, 110, 150):
        found = minimax_foldings(layers, budget, schemes=("inputs",), groups=(1,))
        want = minimax_ranks(spectra, shapes, budget)
        assert {path: one.rank for path, one in found.items()} == want


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_side_by_side_are_the_kernel_and_their_error_bounds_its_own(getkey, scheme):
    kernel = weights(getkey())["conv"]
    matrix = folded(kernel, scheme)
    full = min(matrix.shape[0], matrix.shape[1] // 2)
    whole = np.asarray(factors(kernel, Folding(scheme, 2, full)).materialize())
    back = unfold_matrix(
        jnp.asarray(np.concatenate(list(whole), axis=1)), kernel.shape, scheme
    )
    np.testing.assert_allclose(back, kernel, atol=1e-5)
    cut = np.asarray(factors(kernel, Folding(scheme, 2, 1)).materialize())
    error = np.linalg.norm(matrix - np.concatenate(list(cut), axis=1), 2)
    level = cost_and_error(kernel, Folding(scheme, 2, 1))[1] * np.linalg.norm(matrix, 2)
    assert level * (1 - 1e-5) <= error <= math.sqrt(2) * level * (1 + 1e-5)


def test_a_kernel_of_separable_filters_is_folded_so(getkey):
    """``w[o, i, y, x] = Σ_r a_r[o, y] b_r[i, x]`` is of rank two in one scheme alone."""
    a, b = jr.normal(getkey(), (2, 6, 5)), jr.normal(getkey(), (2, 8, 5))
    kernel = jnp.einsum("roy,rix->oiyx", a, b)
    found = minimax_foldings({"conv": kernel}, 2 * (6 * 5 + 8 * 5), groups=(1,))
    assert found == {"conv": Folding("first", 1, 2)}


def test_refuses():
    weight = {"linear": jnp.ones((4, 9))}
    with pytest.raises(
        ValueError, match=r"budget of 5 numbers; the smallest factors .* 13"
    ):
        minimax_foldings(weight, 5)
    with pytest.raises(ValueError, match="no choice for 'linear' of shape"):
        minimax_foldings(weight, 50, groups=(2, 4))
    with pytest.raises(ValueError, match="no 2 groups of input channels"):
        folded_factors(weight["linear"], Folding("inputs", 2, 1))
