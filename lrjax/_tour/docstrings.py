"""Real sentences that are on every machine: what Python libraries say of themselves."""

import ast
import importlib.util
import random
import re
from pathlib import Path
from typing import NamedTuple


# Each with its own subject; all of them come with lrjax[tour], under BSD or Apache terms.
LIBRARIES = ("matplotlib", "networkx", "scipy", "skimage", "sklearn", "xarray")
_NAMES = re.compile(
    r"\b(matplotlib|mpl|pyplot|plt|networkx|nx|scipy|numpy|np|skimage|scikit-image"
    r"|sklearn|scikit-learn|scikit|xarray|xr)\b",
    re.IGNORECASE,
)


class Texts(NamedTuple):
    """Sentences and the number of the library that each is from."""

    texts: list[str]
    labels: list[int]


def _summaries(file: Path) -> list[str]:
    """The first paragraph of every docstring of a file, names of libraries masked."""
    found = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            words = _NAMES.sub("library", paragraph).split()
            if 8 <= len(words) <= 60:
                found.append(" ".join(words))
    return found


def load(train_size: int, test_size: int) -> tuple[Texts, Texts]:
    """Sentences of each library to train on, and held-back ones from other files."""
    parts = Texts([], []), Texts([], [])
    seen = set()
    for label, library in enumerate(LIBRARIES):
        root = Path(importlib.util.find_spec(library).origin).parent
        files = sorted(
            f for f in root.rglob("*.py") if "test" not in str(f.relative_to(root))
        )
        random.Random(0).shuffle(files)
        remaining = iter(files)
        for part, size in ((parts[1], test_size), (parts[0], train_size)):
            mine = []
            while len(mine) < size and (file := next(remaining, None)) is not None:
                for text in _summaries(file):
                    if text.lower() not in seen:
                        seen.add(text.lower())
                        mine.append(text)
            part.texts.extend(mine[:size])
            part.labels.extend([label] * len(mine[:size]))
    return parts
