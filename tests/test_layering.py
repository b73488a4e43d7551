"""Who may import whom: only rooms further to the left (DESIGN of the package)."""

import ast
from pathlib import Path

import pytest

import lrjax


ROOT = Path(lrjax.__file__).parent
LEVELS = [
    {"_sharding"},
    {"linalg"},
    {"lowrank"},
    {"_tree", "_batching"},
    {"subspaces", "metrics"},
    {"transforms"},
    {"recipes"},
    {"flows", "recovery", "nn"},
    {"adapters", "compression"},
    {"_tour"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# adapters and compression stand right of nn only
FORBIDDEN = {
    (room, other) for room in ("adapters", "compression") for other in ("flows", "recovery")
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    package = ("lrjax", *path.relative_to(ROOT).parent.parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "lrjax" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_the_left(path):
    here = room(path)
    others = imported_rooms(path) - {here}
    if here == "sweep":
        assert not others, f"sweep imports jax alone, not {others}"
        return
    for other in others:
        if here == "_tour" or (here == "__main__" and other != "__main__"):
            continue
        assert other in LEVEL, f"{path} imports {other}, which has no place in the order"
        assert LEVEL[other] < LEVEL[here], f"{here} must not import {other}"
        assert (here, other) not in FORBIDDEN, f"{here} must not import {other}"


def test_public_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in FILES
        if (n := len(p.read_text().splitlines())) > 420
    }
    assert not long, f"split these by mechanism: {long}"
