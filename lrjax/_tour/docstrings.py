"""Real sentences that are on every machine: what Python libraries say of themselves."""

import ast
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


# All of them come with lrjax[tour], under BSD, Apache or Matplotlib terms.
LIBRARIES = ("jax", "matplotlib", "networkx", "scipy", "skimage", "sklearn", "xarray")
KINDS = ("class", "function")


class Texts(NamedTuple):
    """Sentences, and the number of the kind of thing that each describes."""

    texts: list[str]
    labels: list[int]


def _summaries(file: Path) -> Iterator[tuple[str, int]]:
    """The first paragraph of every docstring of a file, and what it describes."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
            if 5 <= len(words) <= 60:
                yield " ".join(words), int(isinstance(node, ast.FunctionDef))


def _files() -> list[Path]:
    """The source files of the libraries, in a fixed random order."""
    files = []
    for library in LIBRARIES:
        root = _root(library)
        inside = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        files.extend(root / path for path in inside if "test" not in str(path))
    random.Random(0).shuffle(files)
    return files


def _root(library: str) -> Path:
    """Where a library is installed, without importing it."""
    found = importlib.util.find_spec(library)
    if found is None or found.origin is None:
        raise ImportError(f"{library} is not installed: pip install 'lrjax[tour]'")
    return Path(found.origin).parent


def load(train_size: int, test_size: int) -> tuple[Texts, Texts]:
    """As many sentences of each kind; the held-back ones are from other files."""
    remaining, seen, parts = iter(_files()), set(), []
    for size in (test_size, train_size):
        found = [[] for _ in KINDS]
        while min(map(len, found)) < size and (file := next(remaining, None)) is not None:
            for text, kind in _summaries(file):
                if text.lower() not in seen:
                    seen.add(text.lower())
                    found[kind].append(text)
        # Of the functions, of which there are more, from all over the files read.
        kept = [
            random.Random(kind).sample(x, min(size, len(x))) for kind, x in enumerate(found)
        ]
        labels = [kind for kind, texts in enumerate(kept) for _ in texts]
        parts.append(Texts([text for texts in kept for text in texts], labels))
    return parts[1], parts[0]
