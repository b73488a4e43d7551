"""Who may import whom: only rooms further to the left, and only by their front door."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import lrjax


ROOT = Path(lrjax.__file__).parent
LEVELS = [
    {"_arguments", "_sharding", "_batching", "_extras"},
    {"linalg", "_progress"},
    {"lowrank"},
    {"_matrices", "_codes", "_dense"},
    {"_sites"},
    {"_tree", "_moments", "_widths"},
    {"subspaces", "metrics"},
    {"transforms"},
    {"recipes"},
    {"flows", "recovery", "nn", "merging", "clustering"},
    {"adapters", "compression", "continual"},
    {"_tour"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# These stand right of nn and merging only.
FORBIDDEN = {
    (room, other)
    for room in ("adapters", "compression", "continual")
    for other in ("flows", "recovery")
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
parts = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, ...]]:
    """What a file imports of lrjax, as paths from its root to the imported name."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found += [tuple(name[1:]) for name in names if name[0] == "lrjax"]
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = (*package[: len(package) - node.level + 1], *module)
            elif module[:1] == ("lrjax",):
                base = module[1:]
            else:
                continue
            found += [(*base, alias.name) for alias in node.names]
    return [name for name in found if name]


@parts
def test_imports_only_from_the_left(path):
    here = room(path)
    others = {name[0] for name in imports(path)} - {here}
    if here == "sweep":
        assert others <= {"_extras", "_progress"}, f"sweep imports jax alone, not {others}"
        return
    for other in others:
        if here == "_tour" or (here == "__main__" and other != "__main__"):
            continue
        assert other in LEVEL, f"{path} imports {other}, which has no place in the order"
        assert LEVEL[other] < LEVEL[here], f"{here} must not import {other}"
        assert (here, other) not in FORBIDDEN, f"{here} must not import {other}"


@parts
def test_rooms_are_entered_by_their_front_door(path):
    for name in imports(path):
        is_room = (ROOT / name[0]).is_dir()
        if name[0] == room(path) or not is_room or name[0] == "_tour":
            continue
        deep = ".".join(name)
        assert len(name) <= 2, f"import {deep} from lrjax.{name[0]} itself"
        assert not name[-1].startswith("_"), f"{deep} is private to its room"
        front = getattr(lrjax, name[0])
        assert len(name) == 1 or hasattr(front, name[1]), f"{deep} is not public"


@parts
def test_what_is_private_stays_in_its_room(path):
    """Also that of rooms in rooms; what stands beside them is seen by all of them."""
    for name in imports(path):
        for i, part in enumerate(name):
            owner = ROOT.joinpath(*name[:i])
            home = owner if owner.is_dir() else owner.parent
            inside = path.is_relative_to(home) or not part.startswith("_")
            assert inside, f"{name} is private to its room"


def test_every_room_is_an_attribute():
    for folder in ROOT.iterdir():
        if (folder / "__init__.py").exists() and not folder.name.startswith("_"):
            assert hasattr(lrjax, folder.name), f"lrjax.{folder.name} is not imported"


def test_public_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in FILES
        if (n := len(p.read_text().splitlines())) > 420
    }
    assert not long, f"split these by mechanism: {long}"


def test_rooms_are_small():
    """All but the index of recipes, and the root with what its rooms share."""
    files = Counter(p.parent.relative_to(ROOT) for p in FILES)
    exempt = (Path(), Path("recipes"))
    large = {str(at): n for at, n in files.items() if n > 12 and at not in exempt}
    assert not large, f"split these by mechanism: {large}"
