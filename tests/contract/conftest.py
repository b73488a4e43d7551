"""In CI the contract is run for every part; without the slow tests, for those of QUICK."""

from pathlib import Path

import jaxtyping
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
FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def shapes_unchecked():
    """Without jaxtyping, which takes a third of the time of what is only traced.

    For tables over many layouts, trees and frameworks, of parts whose annotations
    ``test_every_transform`` checks.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items):
    assert QUICK <= PARTS
    for item in items:
        parts = PARTS.intersection(_words(item))
        if item.path.parent == FOLDER and parts and not parts & QUICK:
            item.add_marker(pytest.mark.slow)


def _words(item) -> list[str]:
    """The words of the name of a parametrized test."""
    return item.callspec.id.split("-") if hasattr(item, "callspec") else []
