"""A public part that is not in the registry escapes every contract test."""

import ast
import inspect
import re
import textwrap
import types
from pathlib import Path

import pytest

import lrjax
from lrjax import subspaces
from tests.registry import (
    ENTRIES,
    NOT_TRANSFORMS,
    PARTS,
    PLUGINS,
    RECIPES,
    TRANSFORMS,
    public_plugins,
)


ROOT = Path(__file__).parents[2]


def public_functions(*packages):
    return {
        name: value
        for package in packages
        for name, value in vars(package).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and name not in NOT_TRANSFORMS
    }


def registered(entries):
    return {name.split("(")[0] for name in entries}


def unknown(entries, *packages):
    return set(public_functions(*packages)) - registered(entries)


ROOMS = [(TRANSFORMS, (lrjax.transforms, subspaces)), (RECIPES, (lrjax.recipes,))]


@pytest.mark.parametrize(("entries", "packages"), ROOMS)
def test_registry_holds_every_public_part(entries, packages):
    missing = unknown(entries, *packages)
    assert not missing, f"enter these in tests/registry.py: {sorted(missing)}"
    assert registered(entries) <= set(public_functions(*packages))


@pytest.mark.parametrize(("entries", "packages"), ROOMS)
def test_a_newcomer_is_missed(entries, packages, monkeypatch):
    def newcomer():
        pass

    monkeypatch.setattr(packages[0], "newcomer", newcomer, raising=False)
    assert unknown(entries, *packages) == {"newcomer"}


def naming(name):
    """The lists outside of its own file in which a part has to be entered."""
    lists = [*ROOT.glob("lrjax/**/__init__.py"), *ROOT.glob("tests/registry.py")]
    return {path for path in lists if re.search(rf"\b{name}\b", path.read_text())}


def test_a_new_part_touches_few_files():
    """Its own file besides these, and the README where it names it."""
    for name in RECIPES:
        assert len(naming(name.split("(")[0])) <= 3, naming(name)
    # A basis is made from its rank without being described, but for those around others.
    files = [len(naming(name)) for name, cls in public_plugins().items()]
    assert sorted(files)[len(files) // 2] <= 2
    assert max(files) <= 3


def test_every_recipe_is_exported():
    for name in registered(RECIPES):
        assert getattr(lrjax, name) is getattr(lrjax.recipes, name)


NOT_OF_A_PAPER = {
    "accumulate_gradients",
    "amplify_slow",
    "every",
    "on_pairs",
    "rebalance",
    "retract",
    "scale_factors",
    "limit_norm_growth",
    "orthogonalize_updates",
    "project_out",
}


@pytest.mark.parametrize("name", sorted(registered(ENTRIES)))
def test_docstring_has_an_example_and_a_source(name):
    function = getattr(lrjax, name)
    doc = inspect.getdoc(function)
    sections = {"Returns:", "Example:"}
    if inspect.signature(function).parameters:
        sections.add("Args:")
    if name not in NOT_OF_A_PAPER:
        sections.add("Reference:")
    for section in sections:
        assert f"\n{section}\n" in doc, f"{name} has no {section[:-1]}"
    if "Reference:" in sections:
        source = doc.split("\nReference:\n")[1]
        assert re.search(r"\(\d{4}\)", source), f"the source of {name} has no year"


@pytest.mark.parametrize("name", sorted(registered(PLUGINS)))
def test_plug_in_has_an_example(name):
    doc = inspect.getdoc(getattr(subspaces, name))
    assert "\nExample:\n" in doc


@pytest.mark.parametrize("name", sorted(registered(RECIPES)))
def test_example_of_a_recipe_takes_steps_and_prints(name):
    example = inspect.getdoc(getattr(lrjax, name)).split("\nExample:\n")[1]
    example = example.split("\nReference:\n")[0]
    assert "tx.update(" in example or "lrjax.solve(" in example
    assert re.search(r">>> print\(|>>> bool\(", example)


def test_numbers_are_arguments():
    for name, entry in ENTRIES.items():
        assert set(entry.numbers) <= set(inspect.signature(entry.factory).parameters), name


KNOWN = {
    **public_functions(lrjax.transforms, subspaces),
    **public_plugins(),
}


def parts_of(function, seen):
    """The registered parts that the source of a function names, by what its names mean."""
    function = inspect.unwrap(function)
    if function in seen:
        return set()
    seen.add(function)
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        value = meaning(node, function.__globals__)
        found |= {name for name, part in KNOWN.items() if part is value}
        if inspect.isfunction(value) and value.__module__.startswith("lrjax.recipes"):
            found |= parts_of(value, seen)
    return found


def meaning(node, scope):
    """What a name, or a name in a module, stands for; None for all else."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = meaning(node.value, scope)
        if isinstance(owner, types.ModuleType):
            return getattr(owner, node.attr, None)
    return None


composed = {name: e for name, e in ENTRIES.items() if e.composed_of}


@pytest.mark.parametrize("entry", composed.values(), ids=composed.keys())
def test_a_composition_is_of_parts_that_pass_the_whole_contract(entry):
    assert set(entry.composed_of) <= registered(PARTS)
    assert set(entry.composed_of) == parts_of(entry.factory, set())
