"""In CI the contract is run for every part; without the slow tests, for those of QUICK.

The tests of one part follow each other, so that they can share its compiled programs.
"""

from pathlib import Path

import pytest

from tests.registry import ENTRIES, PLUGINS, RECIPES


# One or two of each mechanism: factors, moments, matrices, wrappers, the loop's plug-ins.
QUICK = frozenset(
    {
        *("scale_by_gram", "scale_by_polyak", "retract", "scaled_gd", "opsa"),
        *("factored_momentum", "orthogonalize_updates", "quantize_state", "stack_leaves"),
        *("project_updates", "subspace_adam", "galore", "dion", "soap"),
        *("Power", "SVD", "Residual", "Rotate", "Periodic"),
    }
)
PARTS = {*ENTRIES, *PLUGINS, *RECIPES}
ORDER = {part: i for i, part in enumerate((*ENTRIES, *PLUGINS))}
FOLDER = Path(__file__).parent
SHARING = "test_every_transform.py"


def pytest_collection_modifyitems(items):
    assert QUICK <= PARTS
    for item in items:
        parts = PARTS.intersection(_words(item))
        if item.path.parent == FOLDER and parts and not parts & QUICK:
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
