import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax
from lrjax.lowrank import (
    LowRank,
    SVDForm,
    TuckerForm,
    core_shape,
    energy_ranks,
    higher_order_svd,
    knapsack_ranks,
    minimax_ranks,
    parameter_count,
    penalized_ranks,
    unfolded_svd,
)


@pytest.fixture
def rng(getkey):
    return np.random.default_rng(getkey.seed)


def squares_left(spectrum, rank):
    return float(np.sum(np.asarray(spectrum, float)[..., rank:] ** 2))


def cost_and_error(spectra, shapes, ranks):
    """Of a choice, where a path without a rank is dense."""
    cost = error = 0
    for path, shape in shapes.items():
        if path in ranks:
            cost += math.prod(shape[:-2]) * ranks[path] * (shape[-2] + shape[-1])
            error += squares_left(spectra[path], ranks[path])
        else:
            cost += math.prod(shape)
    return cost, error


def best_error(spectra, shapes, budget):
    """By trying all."""
    choices = [[None, *range(1, min(shape[-2:]))] for shape in shapes.values()]
    best = math.inf
    for choice in itertools.product(*choices):
        ranks = {p: r for p, r in zip(shapes, choice, strict=True) if r is not None}
        cost, error = cost_and_error(spectra, shapes, ranks)
        best = min(best, error if cost <= budget else math.inf)
    return best


def random_layers(rng, shapes):
    """Spectra of every steepness."""
    return {
        path: rng.uniform(0.5, 2, (*shape[:-2], 1))
        * np.exp(-rng.uniform(0, 1.5) * np.arange(min(shape[-2:])))
        for path, shape in shapes.items()
    }


def test_parameters_are_those_of_the_nodes():
    of = lambda node: sum(leaf.size for leaf in jax.tree.leaves(node))
    left, right, core = jnp.ones((7, 3)), jnp.ones((5, 3)), jnp.eye(3)
    assert parameter_count((7, 5), 3) == of(LowRank(left, right))
    assert parameter_count((7, 5), (3, 3)) == of(SVDForm(left, core, right))
    stack = LowRank(jnp.ones((4, 7, 3)), jnp.ones((4, 5, 3)))
    assert parameter_count(stack.shape, stack.rank) == of(stack)
    factors = [jnp.ones((2, 4, 1)), jnp.ones((2, 5, 3)), jnp.ones((2, 2, 2))]
    tucker = TuckerForm(jnp.ones((2, 1, 3, 2)), factors)
    assert parameter_count(tucker.shape, tucker.ranks) == of(tucker)


def test_energy_is_that_of_the_metric(rng):
    x = rng.standard_normal((9, 7)) * np.exp(-np.arange(7))
    spectrum = np.linalg.svd(x, compute_uv=False)
    for energy in (0.1, 0.5, 0.9, 0.999):
        want = int(lrjax.metrics.energy_rank(jnp.asarray(x), energy))
        assert energy_ranks({"x": spectrum}, energy) == {"x": want}


def test_energy_of_a_stack_is_summed_and_rank_is_never_zero():
    spectra = {"stack": [[3.0, 1.0], [1.0, 2.0]], "zero": np.zeros(3)}
    # 9 + 4 and 1 + 1, whatever the order of the second.
    assert energy_ranks(spectra, 13 / 15 - 1e-9) == {"stack": 1, "zero": 1}
    assert energy_ranks(spectra, 13 / 15 + 1e-9) == {"stack": 2, "zero": 1}
    assert energy_ranks({"x": [1.0, 1e-3, 0.0]}, 1.0) == {"x": 2}


SMALL = {"a": (3, 4), "b": (6, 5), "c": (2, 9), "d": (2, 5, 5)}


def test_knapsack_keeps_the_budget_and_is_within_a_step_of_the_best(rng):
    spectra = random_layers(rng, SMALL)
    least = sum(
        min(math.prod(s[:-2]) * (s[-2] + s[-1]), math.prod(s)) for s in SMALL.values()
    )
    whole = sum(map(math.prod, SMALL.values()))
    for budget in range(least, whole + 6, 6):
        ranks = knapsack_ranks(spectra, SMALL, budget)
        cost, error = cost_and_error(spectra, SMALL, ranks)
        assert cost <= budget
        # A step takes away no more than what a layer lacks at rank 1.
        step = max(squares_left(spectra[path], 1) for path in SMALL)
        assert error <= best_error(spectra, SMALL, budget) + step
    assert ranks == {}  # there is room for all


LARGE = {"a": (30, 40), "b": (40, 25), "c": (2, 16, 16), "d": (8, 90), "e": (1, 7)}


def test_a_penalty_chooses_by_trying_all_and_the_knapsack_of_its_cost_the_same(rng):
    """What is best at a price of each parameter is best at its cost: the dual problem."""
    spectra = random_layers(rng, LARGE)
    for price in np.geomspace(1e-7, 1e-2, 12):
        ranks = {}
        for path, shape in LARGE.items():
            options: dict[int | None, float] = {None: price * math.prod(shape)}
            for r in range(1, min(shape[-2:])):
                cost, error = cost_and_error(spectra, {path: shape}, {path: r})
                options[r] = price * cost + error
            ranks[path] = min(options, key=options.__getitem__)
        ranks = {path: r for path, r in ranks.items() if r is not None}
        assert penalized_ranks(spectra, LARGE, price / 2) == ranks
        budget, _ = cost_and_error(spectra, LARGE, ranks)
        assert knapsack_ranks(spectra, LARGE, budget) == ranks


def largest_error(spectra, ranks):
    """Of all layers, relative to their norms."""
    cut = lambda s, r: np.max(s[..., r] / s[..., 0]) if r < s.shape[-1] else 0.0
    return max((cut(spectra[path], r) for path, r in ranks.items()), default=0.0)


def test_the_largest_relative_error_is_the_least_of_the_budget(rng):
    spectra = random_layers(rng, SMALL)
    before = math.inf
    for budget in (52, 60, 75, 90, 110):
        ranks = minimax_ranks(spectra, SMALL, budget)
        assert cost_and_error(spectra, SMALL, ranks)[0] <= budget
        error = largest_error(spectra, ranks)
        assert error <= before
        before = error
        for choice in itertools.product(
            *([None, *range(1, min(s[-2:]))] for s in SMALL.values())
        ):
            other = {p: r for p, r in zip(SMALL, choice, strict=True) if r is not None}
            if cost_and_error(spectra, SMALL, other)[0] <= budget:
                assert error <= largest_error(spectra, other)


def test_core_shape_keeps_most_energy_of_all_shapes(rng):
    sizes = (4, 3, 5)
    spectra = [np.sort(rng.uniform(size=n) ** 3)[::-1] for n in sizes]
    kept = lambda ranks: sum(
        np.sum(s[:r] ** 2) for s, r in zip(spectra, ranks, strict=True)
    )
    for budget in (13, 20, 31, 45, 200):
        best = max(
            kept(ranks)
            for ranks in itertools.product(*(range(1, n + 1) for n in sizes))
            if math.prod(ranks) + np.dot(sizes, ranks) <= budget
            and all(r * r <= math.prod(ranks) for r in ranks)
        )
        ranks = core_shape(spectra, budget)
        assert parameter_count(sizes, ranks) <= budget
        assert all(r * r <= math.prod(ranks) for r in ranks)
        np.testing.assert_allclose(kept(ranks), best, rtol=1e-9)


@pytest.mark.slow
def test_core_shape_finds_the_ranks_of_a_tensor_and_bounds_its_error(getkey):
    core = jax.random.normal(getkey(), (2, 3, 2))
    factors = [jax.random.normal(getkey(), (n, r)) for n, r in ((6, 2), (5, 3), (7, 2))]
    x = TuckerForm(core, factors).materialize()
    values, _ = unfolded_svd(x)
    assert core_shape(values, parameter_count((6, 5, 7), (2, 3, 2))) == (2, 3, 2)
    ranks = core_shape(values, 30)
    error = float(jnp.sum((higher_order_svd(x, ranks).materialize() - x) ** 2))
    tails = [squares_left(v, r) for v, r in zip(values, ranks, strict=True)]
    assert max(tails) * (1 - 1e-4) <= error <= sum(tails) * (1 + 1e-4)


def test_equal_shapes_without_room_for_a_dense_one_sort_all_values(rng):
    shapes = dict.fromkeys("abcd", (30, 20))
    spectra = {p: np.sort(rng.uniform(0.9, 1.1, 20))[::-1] for p in shapes}
    ranks = knapsack_ranks(spectra, shapes, 50 * 9 + 13)
    first, rest = [s[0] for s in spectra.values()], [s[1:] for s in spectra.values()]
    largest = np.sort(np.concatenate(rest))[::-1][: 9 - len(first)]
    assert ranks == {p: 1 + int(np.sum(s[1:] >= largest[-1])) for p, s in spectra.items()}


def test_what_factors_would_not_save_stays_dense():
    """4 × 4 at rank 2 costs as much as dense; a single row is never factored."""
    shapes = {"square": (4, 4), "row": (1, 6)}
    spectra = {"square": [1.0, 1.0, 1.0, 1.0], "row": [1.0]}
    assert knapsack_ranks(spectra, shapes, 8 + 6) == {"square": 1}
    assert knapsack_ranks(spectra, shapes, 15 + 6) == {"square": 1}
    assert knapsack_ranks(spectra, shapes, 16 + 6) == {}


def test_a_flat_layer_is_kept_dense_before_its_ranks_are_bought():
    """Its whole rest costs less for each of its squares than one more value."""
    shapes = {"flat": (20, 20), "steep": (20, 20)}
    spectra = {"flat": np.ones(20), "steep": 0.5 ** np.arange(20) * 40}
    ranks = knapsack_ranks(spectra, shapes, 400 + 40 * 5)
    assert ranks == {"steep": 5}


def test_scaled_errors_scale_the_choice_of_no_one_and_weighing_one_that_of_it(rng):
    shapes = {"a": (12, 10), "b": (10, 12), "c": (11, 11)}
    spectra = random_layers(rng, shapes)
    ranks = knapsack_ranks(spectra, shapes, 200)
    assert knapsack_ranks({p: 8 * s for p, s in spectra.items()}, shapes, 200) == ranks
    heavy = knapsack_ranks({**spectra, "a": 100 * spectra["a"]}, shapes, 200)
    assert heavy.get("a", 10) >= ranks.get("a", 10)


def test_changes_may_be_left_away():
    shapes = {"changed": (9, 9), "same": (9, 9)}
    spectra = {"changed": np.ones(9), "same": np.zeros(9)}
    assert knapsack_ranks(spectra, shapes, 40, least=0) == {"changed": 2, "same": 0}
    assert knapsack_ranks(spectra, shapes, 0, least=0) == {"changed": 0, "same": 0}


def test_refuses():
    spectra, shapes = {"a": [2.0, 1.0]}, {"a": (2, 9)}
    with pytest.raises(ValueError, match="rank 1 in every layer takes 11"):
        knapsack_ranks(spectra, shapes, 10)
    with pytest.raises(ValueError, match=r"\['b'\] are in one"):
        knapsack_ranks(spectra, {**shapes, "b": (2, 2)}, 10)
    with pytest.raises(ValueError, match=r"'a' has shape \(2,\).*has \(3,\) singular"):
        knapsack_ranks(spectra, {"a": (3, 9)}, 100)
    with pytest.raises(ValueError, match="'a' has to be an array of finite"):
        energy_ranks({"a": [np.nan, 1.0]}, 0.5)
    with pytest.raises(ValueError, match=r"energy must be in \(0, 1\], got 1.5"):
        energy_ranks(spectra, 1.5)
    with pytest.raises(ValueError, match=r"minimax_ranks got .* every layer takes 11"):
        minimax_ranks(spectra, shapes, 10)
    with pytest.raises(ValueError, match=r"core_shape got .* every axis takes 8"):
        core_shape([[1.0, 0.5], [1.0] * 5], 7)
    with pytest.raises(ValueError, match="needs 3 axes"):
        parameter_count((4, 4), (1, 1, 1))
