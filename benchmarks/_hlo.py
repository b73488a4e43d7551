"""What a compiled program does, read from its text: kernels, loops, collectives, products.

``read(text)`` walks a program from its entry, as a device runs it: the body of a loop as
often as the loop turns, of each conditional the longest branch, and that apart. It
understands the text before and after compilation, for CPU, GPU and TPU.

A kernel is an instruction that a device starts: a fusion, a library call, a copy, a
collective. A library call counts as one, whatever it starts itself; what only prefetches
into the memory of a core and the arithmetic of single numbers, which a TPU does on the
side, count as none.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections import Counter

import jax
from _hlo_text import Instruction, fused, parse
from _hlo_traffic import PREFETCH, traffic


FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
COLLECTIVES = {
    *("all-gather", "all-reduce", "all-to-all", "collective-permute"),
    *("reduce-scatter", "ragged-all-to-all", "collective-broadcast"),
}
STARTED = {"fusion", "custom-call", "copy", *COLLECTIVES}  # of single numbers, too


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done, in amounts that add up.

    Attributes:
        kernels: how many are started.
        traffic: bytes that kernels read from and write to the memory of the device.
        sent: bytes of the results of collectives, by kind.
        flops: of matrix products, by type and precision, as in ``"f32 highest"``.
    """

    kernels: int = 0
    traffic: int = 0
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    flops: Counter[str] = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.kernels + other.kernels,
            self.traffic + other.traffic,
            self.sent + other.sent,
            self.flops + other.flops,
        )

    def __or__(self, other: "Work") -> "Work":
        """The larger of the two in each amount."""
        return Work(
            max(self.kernels, other.kernels),
            max(self.traffic, other.traffic),
            self.sent | other.sent,
            self.flops | other.flops,
        )

    def __mul__(self, count: int) -> "Work":
        many = lambda amounts: Counter({k: n * count for k, n in amounts.items()})
        return Work(
            self.kernels * count, self.traffic * count, many(self.sent), many(self.flops)
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """One run of a program, or of one of its computations.

    Attributes:
        always: what every run does.
        branches: what the longest branch of every conditional adds.
        conditionals: how many of them a run decides.
        open_loops: loops whose number of turns only the data decide; they count as one.
    """

    always: Work = dataclasses.field(default_factory=Work)
    branches: Work = dataclasses.field(default_factory=Work)
    conditionals: int = 0
    open_loops: int = 0

    def __add__(self, other: "Program") -> "Program":
        return Program(
            self.always + other.always,
            self.branches + other.branches,
            self.conditionals + other.conditionals,
            self.open_loops + other.open_loops,
        )

    def __mul__(self, count: int) -> "Program":
        return Program(
            self.always * count,
            self.branches * count,
            self.conditionals * count,
            self.open_loops,
        )

    @property
    def worst(self) -> Work:
        """What a run does that takes the longest branch everywhere."""
        return self.always + self.branches


def read(text: str) -> Program:
    """What one run of the program with this text does."""
    return _Reader(text).run()


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """A compiled program and the seconds of processor time that this took."""
    before = _processor_seconds()
    program = lowered.compile()
    return program, _processor_seconds() - before


def measure(lowered: jax.stages.Lowered) -> dict:
    """Compile a program, and read all that holds for it without running it.

    Args:
        lowered: the program, as ``jax.jit(function).lower(*arguments)`` gives it.

    Returns:
        Kernels, conditionals, open loops; bytes in the memory of one device: of the
        arguments, temporaries and code, read and written, received by collectives
        (``sent``) of each kind; flops of matrix products by type and precision, of the
        whole program as written; processor seconds of the compilation. What only
        conditionals do, at worst, is named ``branch_…``.
    """
    # The compiler turns products into calls of all kinds: they are counted as written.
    flops = read(lowered.compiler_ir("hlo").as_hlo_text())
    program, seconds = compiled(lowered)
    run, memory = read(program.as_text()), program.memory_analysis()
    return {
        "kernels": run.always.kernels,
        "branch_kernels": run.branches.kernels,
        "conditionals": run.conditionals,
        "open_loops": run.open_loops,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "traffic": run.always.traffic,
        "branch_traffic": run.branches.traffic,
        "sent": dict(run.always.sent),
        "branch_sent": dict(run.branches.sent),
        "flops": dict(flops.always.flops),
        "branch_flops": dict(flops.branches.flops),
        "compile_seconds": seconds,
    }


def _processor_seconds() -> float:
    """Of all threads of this process, and of the processes that it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


class _Reader:
    """The computations of a program by name, and the walks through them."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        # A TPU spreads one collective over the kernels of several computations, the bodies
        # of loops among them: it is counted in one of these, the entry if it is there.
        self.homes: dict[tuple[str, str], str] = {}
        for name in sorted(self.computations, key=lambda name: name != self.entry):
            for one in self.collectives(name):
                self.homes.setdefault(one, name)

    def run(self) -> Program:
        return self.walk(self.entry)

    def walk(self, name: str) -> Program:
        """What one run of a computation does."""
        lines = self.computations[name].values()
        total = sum((self.step(name, line) for line in lines), Program())
        return total + Program(Work(sent=self.sent(name)))

    def step(self, name: str, line: Instruction) -> Program:
        """What one line of the computation ``name`` does, collectives apart."""
        if line.op in FREE or line.op.endswith("-done"):
            return Program()
        if line.op == "call":
            return self.walk(*line.called("to_apply"))
        if line.op == "while":
            return self.loop(name, line)
        if line.op == "conditional":
            return self.conditional(line)
        moved = traffic(self.computations, name, line)
        return Program(Work(self.starts(name, line), moved, flops=self.flops(name, line)))

    def starts(self, name: str, line: Instruction) -> int:
        """How many kernels a line is, one or none."""
        around = self.computations[name]
        arrays = [a for n in line.operands if n in around for a in around[n].results]
        single = all(array.shape == () for array in (*arrays, *line.results))
        return int(line.op not in PREFETCH and not (single and line.op not in STARTED))

    def loop(self, name: str, line: Instruction) -> Program:
        (condition,), (body,) = line.called("condition"), line.called("body")
        turns = self.turns(name, line, condition)
        if turns is not None:
            return self.walk(body) * turns
        return self.walk(body) + self.walk(condition) + Program(open_loops=1)

    def conditional(self, line: Instruction) -> Program:
        roles = ("branch_computations", "true_computation", "false_computation")
        runs = [self.walk(branch) for branch in line.called(*roles)]
        return Program(
            branches=functools.reduce(Work.__or__, (run.worst for run in runs)),
            conditionals=1 + max(run.conditionals for run in runs),
            open_loops=max(run.open_loops for run in runs),
        )

    def turns(self, name: str, line: Instruction, condition: str) -> int | None:
        """How often a loop turns, if it counts up by one from a constant to a constant."""
        known = re.search(r"known_trip_count\D*(\d+)", line.text)
        if known:
            return int(known[1])
        test = next(i for i in self.computations[condition].values() if i.root)
        if test.op == "fusion":  # around the comparison alone
            test = next(i for i in fused(self.computations, test) if i.root)
        if test.op != "compare" or "direction=LT" not in test.text:
            return None
        start = self.computations[name].get(line.operands[0])
        limit = self.constant(condition, test.operands[1], name, start)
        first = self.constant(condition, test.operands[0], name, start)
        return None if limit is None or first is None else limit - first

    def constant(
        self,
        at: str,
        name: str,
        outside: str | None = None,
        tuple_: Instruction | None = None,
    ) -> int | None:
        """The whole number that a name stands for in a computation, as far as it shows.

        Where that is one of the things that a loop carries, its value before the loop.
        """
        line = self.computations[at].get(name)
        if line is None:
            return None
        if line.op == "constant":
            value = re.search(r"constant\((-?\d+)\)", line.text)
            return int(value[1]) if value else None
        if line.op in ("copy", "bitcast", "convert"):
            return self.constant(at, line.operands[0], outside, tuple_)
        if line.op == "get-tuple-element" and tuple_ is not None and tuple_.op == "tuple":
            place = int(re.search(r"index=(\d+)", line.text)[1])
            return self.constant(outside, tuple_.operands[place])
        return None

    def sent(self, name: str) -> Counter[str]:
        """Bytes of the collectives of a computation, by kind."""
        total = Counter()
        for one, size in self.collectives(name).items():
            total[one[0]] += size if self.homes[one] == name else 0
        return total

    def collectives(self, name: str) -> dict[tuple[str, str], int]:
        """Bytes of the collectives of a computation, by kind and name, or channel.

        A collective that is spread over several kernels shows in all of them, with one
        channel; others may have theirs in common. One that starts here and ends there
        gives its result at its end.
        """
        found = {}
        for line in self.computations[name].values():
            for one in (line, *fused(self.computations, line)):
                kind = one.op.removesuffix("-done")
                if kind in COLLECTIVES:
                    channel = re.search(r"channel_id=\d+", one.text)
                    spread = one is not line and channel
                    size = sum(array.size for array in one.results)
                    found[kind, channel[0] if spread else f"{name} {one.name}"] = size
        return found

    def flops(self, name: str, line: Instruction) -> Counter[str]:
        """Of a matrix product: twice the size of the result times what is summed over."""
        if line.op != "dot":
            return Counter()
        left, right = (self.computations[name][n].results[0] for n in line.operands)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.text)
        summed = [left.shape[int(axis)] for axis in axes[1].split(",") if axis]
        precision = re.search(r"operand_precision=\{(\w+)", line.text)
        dtype = left.dtype if left.dtype == right.dtype else f"{left.dtype}·{right.dtype}"
        key = f"{dtype} {precision[1] if precision else 'default'}"
        return Counter({key: 2 * math.prod(line.results[0].shape) * math.prod(summed)})
