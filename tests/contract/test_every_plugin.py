"""What only the plug-ins of the subspace loop have to be: plain values, all of them here.

Their numbers are checked with those of the transforms, each in its place of one cheap
optimizer: jit, vmap, stacks, dtypes and checkpoints.
"""

import equinox as eqx
import jax
import pytest

from lrjax import subspaces as sub
from tests import registry
from tests.registry import ARGUMENTS, KINDS, PLUGINS, VARIANTS, public_plugins


every = pytest.mark.parametrize(("name", "entry"), PLUGINS.items(), ids=PLUGINS.keys())


def plugin(name, entry, **changes):
    cls = getattr(sub, name.split("(")[0])
    return cls(**{**entry.arguments, **changes})


def test_a_new_plug_in_is_checked_without_being_entered(monkeypatch):
    class Newcomer(sub.SVD):
        pass

    class Abstract(sub.MatrixBasis):
        pass

    monkeypatch.setattr(sub, "Newcomer", Newcomer, raising=False)
    monkeypatch.setattr(sub, "Abstract", Abstract, raising=False)
    assert public_plugins().keys() - PLUGINS.keys() == {"Newcomer"}


def test_every_kind_is_here_and_nothing_is_left_over():
    kinds = {type(plugin(*item)).__mro__ for item in PLUGINS.items()}
    assert all(any(kind in mro for mro in kinds) for kind in KINDS.values())
    known = {name.split("(")[0] for name in PLUGINS}
    assert known == set(public_plugins())
    assert set(ARGUMENTS) | {name.split("(")[0] for name in VARIANTS} <= known


@every
def test_is_a_value(name, entry):
    """It prints as it is written, equals its like and nothing else, and may be a key."""
    one = plugin(name, entry)
    assert repr(one).startswith(name.split("(")[0] + "(")
    assert " at 0x" not in repr(one)
    assert bool(one == plugin(name, entry))
    for number in entry.numbers:
        another = 1123 if isinstance(entry.arguments[number], int) else 1.123
        changed = plugin(name, entry, **{number: another})
        assert str(another) in repr(changed)
        assert not bool(one == changed)
    others = [plugin(*item) for item in PLUGINS.items() if item[0] != name]
    assert not any(bool(one == other) for other in others)


def test_the_rank_makes_a_difference():
    assert sub.Power(4) == sub.Power(4)
    assert sub.Power(4) != sub.Power(5)
    assert sub.Power(4) != sub.Power(4, blocks=2)
    assert repr(sub.Power(0.25, blocks=8)) == "Power(rank=0.25, blocks=8)"


@every
def test_is_a_tree_whose_numbers_may_be_mapped(name, entry):
    one = plugin(name, entry)
    arrays, rest = eqx.partition(one, eqx.is_array)
    assert bool(eqx.combine(arrays, rest) == one)
    leaves, structure = jax.tree.flatten(one)
    assert bool(jax.tree.unflatten(structure, leaves) == one)


def test_numbers_are_found_by_their_annotation():
    found = {name: set(entry.numbers) for name, entry in PLUGINS.items()}
    assert found["RotateVariance"] == {"b1", "b2"}
    assert found["Periodic"] == {"steps"}
    assert found["Switch"] == {"at"}
    assert found["Power"] == set()
    assert found["Power(blend)"] == {"blend"}
    assert registry.numbers_of(sub.ScaledGradient, {}) == {
        "scale": 0.5,
        "max_growth": 0.505,
    }
