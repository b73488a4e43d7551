"""The pages that are written from the package: its rooms, its methods, the notebooks.

A new public name of a room, a new recipe and a new notebook appear by themselves.
"""

import ast
import functools
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import lrjax


# Modules with names of their own, most of them for an extra.
APART = {
    "adapters": ("lrjax.adapters.nnx", "lrjax.adapters.qwix"),
    "clustering": ("lrjax.clustering.sklearn",),
    "recovery": ("lrjax.recovery.sklearn",),
}
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))


def pages() -> dict[str, str]:
    """The text of every generated page, by its path below docs/."""
    return {
        **{f"rooms/{room}.rst": room_page(room) for room in rooms()},
        **{f"notebooks/{path.name}": path.read_text() for path in NOTEBOOKS},
        "_rooms.md": room_table(),
        "_methods.md": method_table(),
        "_notebooks.md": notebook_list(),
    }


@functools.cache
def rooms() -> dict[str, ModuleType]:
    """The public modules directly below ``lrjax``."""
    names = [module.name for module in pkgutil.iter_modules(lrjax.__path__)]
    return {
        name: importlib.import_module(f"lrjax.{name}")
        for name in names
        if not name.startswith("_")
    }


def public_names(module: ModuleType) -> list[str]:
    """What a module defines, and what it re-exports as ``X as X``, in its own order."""
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.name == alias.asname]
    return [
        name
        for name in names
        if not name.startswith("_") and not inspect.ismodule(getattr(module, name))
    ]


@functools.cache
def public_paths() -> dict[str, tuple[str, str]]:
    """The path by which users know a name: ``lrjax.x``, or else ``lrjax.room.x``.

    Returns:
        The room and the name of each path; of two rooms the one that defines it.
    """
    paths: dict[str, tuple[str, str]] = {}
    for room, module in rooms().items():
        for name in public_names(module):
            value = getattr(module, name)
            flat = getattr(lrjax, name, None) is value
            path = f"lrjax.{name}" if flat else f"lrjax.{room}.{name}"
            if path not in paths or _home(value).startswith(f"lrjax.{room}."):
                paths[path] = room, name
    return paths


def _home(value: object) -> str:
    """The module that defines a function or a class, e.g. ``lrjax.linalg.polar``."""
    documented = inspect.isclass(value) or inspect.isfunction(value)
    return value.__module__ if documented else ""


def first_line(value: object) -> str:
    """The first line of a docstring; nothing for a plain value such as a type alias."""
    if inspect.ismodule(value) and not value.__doc__:  # a room of one function
        (value,) = (getattr(value, name) for name in public_names(value))
    documented = inspect.ismodule(value) or _home(value)
    return (inspect.getdoc(value) or "").split("\n")[0] if documented else ""


def room_page(room: str) -> str:
    """What a room is for, a list of its names, and each of them in full."""
    module = rooms()[room]
    groups: dict[str, list[str]] = {}
    for path, (owner, name) in public_paths().items():
        if owner == room:
            groups.setdefault(_mechanism(module, name), []).append(path)
    # What is alone in its file comes first, under no heading.
    alone = [path for group in groups.values() if len(group) == 1 for path in group]
    groups = {"": alone, **{key: group for key, group in groups.items() if len(group) > 1}}
    parts = [_heading(module.__name__, "="), first_line(module)]
    for title, group in groups.items():
        parts += [f".. rubric:: {title}"] if title else []
        parts += [_summary(group)] if group else []
    for title, group in groups.items():
        parts += [_heading(title, "-")] if title else []
        parts += [_directive(path) for path in group]
    for name in APART.get(room, ()):
        apart = importlib.import_module(name)
        parts += [_heading(name, "-"), inspect.getdoc(apart) or ""]
        for public in public_names(apart):
            directive = _directive(f"{name}.{public}")
            parts += [f"{directive}\n   :members:" if "class" in directive else directive]
    return "\n\n".join(parts) + "\n"


def _mechanism(module: ModuleType, name: str) -> str:
    """A title from the file or the folder of a room that defines a name."""
    home = _home(getattr(module, name))
    if not home:
        return "Types"
    file = home.removeprefix(module.__name__).strip(".").split(".")[0]
    return file.strip("_").replace("_", " ").capitalize()


def _value(path: str) -> object:
    if path in public_paths():
        room, name = public_paths()[path]
        return getattr(rooms()[room], name)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def _summary(paths: list[str]) -> str:
    rows = [
        f"   * - :py:obj:`~{path}`\n     - {first_line(_value(path))}" for path in paths
    ]
    return "\n".join([".. list-table::\n   :widths: 1 3\n   :class: summary\n", *rows])


def _directive(path: str) -> str:
    value = _value(path)
    if inspect.isclass(value):
        return f".. autoclass:: {path}"
    if inspect.isfunction(value):
        return f".. autofunction:: {path}"
    return f".. py:data:: {path}\n   :value: {value}"


def room_table() -> str:
    """The rooms, each with the first line of its docstring."""
    lines = ["| room | what is in it |", "|---|---|"]
    for room, module in rooms().items():
        lines.append(f"| [`{module.__name__}`](rooms/{room}.rst) | {_markdown(module)} |")
    return "\n".join(lines) + "\n"


def method_table() -> str:
    """The recipes: what each is, and where it comes from."""
    lines = ["| recipe | what it is | source |", "|---|---|---|"]
    for name in sorted(public_names(rooms()["recipes"])):
        recipe = getattr(lrjax, name)
        if inspect.isfunction(recipe):
            cells = f"`{name}`", _markdown(recipe), _source(recipe)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown(value: object) -> str:
    line = re.sub(r":\w+:`~?(.+?)`", r"`\1`", first_line(value))
    return line.replace("``", "`").replace("|", r"\|")


def _source(recipe: Callable) -> str:
    """The arXiv numbers of the Reference section, as links, or else its first words."""
    reference = " ".join((inspect.getdoc(recipe) or "").split("Reference:")[1].split())
    numbers = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", reference))
    links = [f"[{number}](https://arxiv.org/abs/{number})" for number in numbers]
    return ", ".join(links) or reference.split(" Special case")[0]


def notebook_list() -> str:
    """The notebooks, each with its own title and first paragraph."""
    parts = []
    for path in NOTEBOOKS:
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        title, opening = first.split("\n\n")[:2]
        parts.append(
            f"## [{title.removeprefix('# ')}](notebooks/{path.name})\n\n{opening}\n"
        )
    return "\n".join(parts)
