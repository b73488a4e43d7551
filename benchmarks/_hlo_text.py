"""The text of a program as XLA prints it, before or after compilation, line by line."""

import math
import re
from typing import NamedTuple


DTYPES = r"pred|token|opaque|[a-z]+\d+\w*"


class Array(NamedTuple):
    """Type and shape of one array, and whether it lives in the memory of a core."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        """Bytes."""
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(math.prod(self.shape) * (int(bits[0]) if bits else 8) / 8)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    op: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    def called(self, *roles: str) -> list[str]:
        """The computations that it runs in these roles."""
        found = [
            re.search(rf"\b{role}=(\{{[^}}]*\}}|[^\s,]+)", self.text) for role in roles
        ]
        return [name for match in found if match for name in _names(match[1])]


Computations = dict[str, dict[str, Instruction]]  # the lines of each by name


def fused(computations: Computations, line: Instruction) -> list[Instruction]:
    """The lines that one line runs as one kernel."""
    return [i for called in line.called("calls") for i in computations[called].values()]


def parse(text: str) -> tuple[Computations, str]:
    """The lines of every computation by name, and the name of the entry."""
    computations, entry, lines = {}, "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{", line)
        if head:
            lines = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
            if found:
                lines[found[2]] = Instruction(
                    name=found[2],
                    op=found[4],
                    results=_arrays(found[3]),
                    operands=_operands(line, found.end()),
                    text=line,
                    root=bool(found[1]),
                )
    return computations, entry


def _arrays(text: str) -> tuple[Array, ...]:
    found = re.finditer(rf"\b({DTYPES})\[([^\]]*)\](\{{[^}}]*\}})?", text)
    return tuple(
        Array(
            match[1],
            tuple(int(n) for n in re.findall(r"\d+", match[2])),
            bool(re.search(r"S\([1-4]\)", match[3] or "")),
        )
        for match in found
    )


def _operands(line: str, start: int) -> tuple[str, ...]:
    """The names between the parenthesis that opens before ``start`` and its partner."""
    depth, parts = 0, [""]
    for letter in line[start:]:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.split()[-1].lstrip("%") for part in parts if part.split())


def _names(text: str) -> list[str]:
    return [name.strip().lstrip("%") for name in text.strip("{}").split(",")]
