import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax.compression import restore_change, store_change


class Model(eqx.Module):
    """A layer of each kind, a stack, a norm, and an array of its own."""

    linear: eqx.nn.Linear
    still: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    table: eqx.nn.Embedding
    stack: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    experts: jax.Array
    name: str = "model"

    def __init__(self, key, dtype=jnp.float32):
        a, b, c, d, e, f = jr.split(key, 6)
        self.linear = eqx.nn.Linear(12, 10, dtype=dtype, key=a)
        self.still = eqx.nn.Linear(12, 10, dtype=dtype, key=b)
        self.conv = eqx.nn.Conv2d(4, 6, 3, dtype=dtype, key=c)
        self.table = eqx.nn.Embedding(20, 8, dtype=dtype, key=d)
        layer = lambda key: eqx.nn.Linear(9, 9, dtype=dtype, key=key)
        self.stack = eqx.filter_vmap(layer)(jr.split(e, 3))
        self.norm = eqx.nn.LayerNorm(12, dtype=dtype)
        self.experts = jr.normal(f, (2, 7, 8), dtype)


make = eqx.filter_jit(Model)


@eqx.filter_jit
def tuned(model, key, rank=None):
    """All but one layer changed, by matrices of some rank or by noise."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(arrays)
    keys = jr.split(key, len(leaves))

    def change(x, key):
        if x.ndim < 2 or rank is None:
            return 0.1 * jr.normal(key, x.shape, x.dtype)
        flat = (x.shape[0], x.size // len(x)) if x.ndim == 4 else x.shape
        a, b = jr.split(key)
        left = jr.normal(a, (*flat[:-1], rank), x.dtype)
        right = jr.normal(b, (*flat[:-2], rank, flat[-1]), x.dtype)
        return (0.1 * left @ right).reshape(x.shape)

    new = [x + change(x, k) for x, k in zip(leaves, keys, strict=True)]
    new = eqx.combine(treedef.unflatten(new), rest)
    return eqx.tree_at(lambda m: m.still, new, model.still)


def far(one, other):
    """The largest difference of two models."""
    arrays = lambda model: jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return max(
        np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max()
        for x, y in zip(arrays(one), arrays(other), strict=True)
    )


@pytest.fixture
def base(getkey):
    return make(getkey())


@pytest.mark.slow
def test_changes_of_some_rank_are_found_and_restored(base, getkey):
    new = tuned(base, getkey(), rank=2)
    change, report = store_change(new, base, energy=1 - 1e-6)
    assert {row.path: row.rank for row in report.layers} == dict.fromkeys(
        ("linear", "conv", "table", "stack", "experts"), 2
    )
    assert "still" not in change
    assert far(restore_change(base, change), new) < 1e-3
    numbers = sum(x.size for x in jax.tree.leaves(change))
    assert numbers == report.after < report.before


def test_a_budget_is_kept_and_what_is_lost_is_told(base, getkey):
    new = tuned(base, getkey())
    before = np.inf
    for budget in (0.1, 0.4, 0.7):
        change, report = store_change(new, base, budget=budget)
        whole = sum(row.before for row in report.layers)
        assert sum(row.after for row in report.layers) <= budget * whole
        again = restore_change(base, change)
        lost = 0.0
        for row in report.layers:
            of = lambda model, row=row: getattr(model, row.path)
            weight = lambda model, of=of: np.asarray(
                getattr(of(model), "weight", of(model))
            )
            error = np.linalg.norm((weight(again) - weight(new)).ravel())
            size = np.linalg.norm((weight(new) - weight(base)).ravel())
            np.testing.assert_allclose(row.error, error / size, atol=1e-4)
            lost += error**2
        assert lost < before
        before = lost
        # Vectors are kept whole.
        np.testing.assert_allclose(again.norm.weight, new.norm.weight, atol=1e-6)
        np.testing.assert_allclose(again.conv.bias, new.conv.bias, atol=1e-6)


@pytest.mark.slow
def test_all_of_it_is_exact_and_nothing_is_nothing(base, getkey):
    new = tuned(base, getkey())
    change, report = store_change(new, base, budget=1.0)
    assert all(row.rank is None for row in report.layers)
    assert far(restore_change(base, change), new) < 1e-6
    change, report = store_change(base, base, energy=0.9)
    assert change == {}
    assert report.layers == ()


@pytest.mark.slow
def test_factors_at_eight_bits(base, getkey):
    new = tuned(base, getkey(), rank=2)
    plain, _ = store_change(new, base, energy=1 - 1e-6)
    change, report = store_change(new, base, energy=1 - 1e-6, codec=lrjax.adapters.Int8())
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    factors = lambda tree: [(own.left, own.right) for own in tree.values()]
    assert bytes_of(factors(change)) < 0.5 * bytes_of(factors(plain))
    # A number is off by at most 0.4 % of the largest of its block, 1 % of a typical one.
    assert all(1e-4 < row.error < 0.05 for row in report.layers)
    assert 1e-4 < far(restore_change(base, change), new) < 0.05


@pytest.mark.slow
def test_half_precision_models_are_restored_in_their_dtype(getkey):
    base = make(getkey(), jnp.bfloat16)
    new = tuned(base, getkey())
    again = restore_change(base, store_change(new, base, budget=1.0)[0])
    assert again.linear.weight.dtype == jnp.bfloat16
    assert far(again, new) == 0


@pytest.mark.slow
def test_a_change_goes_through_a_file(base, getkey, tmp_path):
    new = tuned(base, getkey(), rank=2)
    change, _ = store_change(new, base, energy=1 - 1e-6)
    eqx.tree_serialise_leaves(tmp_path / "change.eqx", change)
    back = eqx.tree_deserialise_leaves(tmp_path / "change.eqx", change)
    assert far(restore_change(base, back), restore_change(base, change)) == 0


def test_refuses(base, getkey):
    with pytest.raises(ValueError, match="one of budget= and energy="):
        store_change(base, base)
    other = eqx.tree_at(lambda m: m.linear, base, eqx.nn.Linear(12, 11, key=getkey()))
    with pytest.raises(ValueError, match=r"linear has arrays \[\(10, 12\), .* in the base"):
        store_change(other, base, energy=0.9)
    with pytest.raises(ValueError, match=r"\['w'\] are not in this one"):
        restore_change(base, {"w": lrjax.compression.StoredChange()})
