"""Bytes that the kernels of a program read from and write to the memory of a device."""

import re
from collections.abc import Iterable

from _hlo_text import Array, Computations, Instruction, fused


PREFETCH = {"copy-start", "slice-start"}
SLICES = {"slice", "dynamic-slice", "gather"}


def traffic(computations: Computations, name: str, line: Instruction) -> int:
    """Bytes between a kernel and the memory of the device.

    Of an array that it slices only the slice is read, and of one that it updates in
    place only the update is written.
    """
    around = computations[name]
    if line.op in PREFETCH:
        return line.results[0].size
    if line.op in SLICES:
        return 2 * _size(line.results)
    if line.op == "dynamic-update-slice":
        return 2 * _size(around[line.operands[1]].results)
    lines = fused(computations, line)
    if not lines:
        arrays = [
            array for n in line.operands if n in around for array in around[n].results
        ]
        return _size(arrays) + _size(line.results)
    arguments = sorted(
        (int(re.search(r"parameter\((\d+)\)", i.text)[1]), i.name)
        for i in lines
        if i.op == "parameter"
    )
    read = sum(
        _read(lines, inner, around[outer].results)
        for outer, (_, inner) in zip(line.operands, arguments, strict=False)
        if outer in around
    )
    return read + _written(lines, line.results)


def _size(arrays: Iterable[Array]) -> int:
    return sum(array.size for array in arrays if not array.on_chip)


def _read(lines: list[Instruction], name: str, arrays: tuple[Array, ...]) -> int:
    """Bytes of an argument that the lines of a fusion look at."""
    if not _size(arrays):
        return 0
    users = [line for line in lines if name in line.operands]
    total = 0
    for user in users:
        first = user.operands[0] == name and name not in user.operands[1:]
        if first and user.op in SLICES:
            total += _size(user.results)
        elif first and user.op == "bitcast":
            total += _read(lines, user.name, arrays)
        elif not (first and user.op == "dynamic-update-slice"):
            return _size(arrays)
    return min(total, _size(arrays))


def _written(lines: list[Instruction], results: tuple[Array, ...]) -> int:
    """Bytes that a fusion writes: those of the update, if its root updates in place."""
    by_name = {line.name: line for line in lines}
    root = next(line for line in lines if line.root)
    ends = [by_name[n] for n in root.operands] if root.op == "tuple" else [root]
    total = 0
    for end, result in zip(ends, results, strict=False):
        while end.op == "bitcast":
            end = by_name[end.operands[0]]
        if end.op == "dynamic-update-slice" and not result.on_chip:
            total += sum(array.size for array in by_name[end.operands[1]].results)
        else:
            total += _size([result])
    return total
