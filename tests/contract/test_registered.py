"""A public transform or recipe that is not in the registry escapes every contract test."""

import inspect

import pytest

import lrjax
from tests.registry import NOT_TRANSFORMS, RECIPES, TRANSFORMS


def public_functions(package):
    return {
        name
        for name, value in vars(package).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and name not in NOT_TRANSFORMS
    }


def registered(entries):
    return {name.split("(")[0] for name in entries}


@pytest.mark.parametrize(
    ("package", "entries"), [(lrjax.transforms, TRANSFORMS), (lrjax.recipes, RECIPES)]
)
def test_registry_holds_every_public_part(package, entries):
    missing = public_functions(package) - registered(entries)
    assert not missing, f"enter these in tests/registry.py: {sorted(missing)}"
    assert registered(entries) <= public_functions(package)


@pytest.mark.parametrize("name", sorted(registered({**TRANSFORMS, **RECIPES})))
def test_docstring_has_an_example_and_a_source(name):
    doc = inspect.getdoc(getattr(lrjax, name))
    for section in ("Args:", "Returns:", "Example:"):
        if section == "Args:" and not inspect.signature(getattr(lrjax, name)).parameters:
            continue
        assert section in doc, f"{name} has no {section[:-1]}"


def test_numbers_are_arguments():
    for name, entry in {**TRANSFORMS, **RECIPES}.items():
        assert set(entry.numbers) <= set(inspect.signature(entry.factory).parameters), name
