"""In CI the contract is run for every part; without the slow tests, for those of QUICK.

The tests of one part follow each other, so that they can share its compiled programs.
"""

from pathlib import Path

import pytest

from tests.registry import ENTRIES, PLUGINS, RECIPES


# One of each mechanism: factors, moments, matrices, wrappers, the loop and a plug-in of it.
QUICK = frozenset(
    {
        *("scale_by_gram", "scale_by_polyak", "scaled_gd", "orthogonalize_updates"),
        *("stack_leaves", "subspace_adam", "Residual"),
    }
)
# What is only traced, and quickly, is asked of every part.
OF_ALL = ("test_map_params_reaches_all_that_belongs_to_a_parameter",)
PARTS = {*ENTRIES, *PLUGINS, *RECIPES}
ORDER = {part: i for i, part in enumerate((*ENTRIES, *PLUGINS))}
FOLDER = Path(__file__).parent
SHARING = "test_every_transform.py"


def pytest_collection_modifyitems(items):
    assert QUICK <= PARTS
    for item in items:
        if item.path.parent != FOLDER or item.originalname in OF_ALL:
            continue
        parts = PARTS.intersection(_words(item))
        if parts and not parts & QUICK:
            item.add_marker(pytest.mark.slow)
    ours = [i for i, item in enumerate(items) if item.path.name == SHARING]
    by_part = sorted((items[i] for i in ours), key=_part)
    for i, item in zip(ours, by_part, strict=True):
        items[i] = item


def _part(item) -> int:
    """The place of the part that a test is about in the registry."""
    return min((ORDER[word] for word in _words(item) if word in ORDER), default=-1)


def _words(item) -> list[str]:
    """The words of the name of a parametrized test."""
    return item.callspec.id.split("-") if hasattr(item, "callspec") else []
