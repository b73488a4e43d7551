"""What each program may take on each kind of device, and whether it stays within it."""

import json
import math
from pathlib import Path


PATH = Path(__file__).parents[1] / "tests" / "accelerators" / "budgets.json"
# All that a budget limits is read from the program, and exact, but the processor's seconds:
# they depend on the processor and on what else it does.
COUNTS = (
    *("kernels", "branch_kernels", "conditionals", "open_loops"),
    *("sent", "branch_sent", "argument_bytes", "temporary_bytes", "code_bytes"),
)
SECONDS = "compile_seconds"


def load() -> dict[str, dict]:
    """For each kind of device the versions, and the budgets of the programs by name."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def save(budgets: dict[str, dict]) -> None:
    """Write them, a line for each program."""
    blocks = []
    for target, own in budgets.items():
        lines = [
            f"{json.dumps(name)}: {json.dumps(budget)}"
            for name, budget in own["programs"].items()
        ]
        programs = ",\n      ".join(lines)
        blocks.append(
            f'  {json.dumps(target)}: {{\n    "versions": {json.dumps(own["versions"])},\n'
            f'    "programs": {{\n      {programs}\n    }}\n  }}'
        )
    PATH.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def amounts(found: dict) -> dict[str, float]:
    """What a budget limits, of what was measured of a program."""
    counts = {
        name: sum(found[name].values()) if isinstance(found[name], dict) else found[name]
        for name in COUNTS
    }
    return {**counts, SECONDS: round(found[SECONDS], 2)}


def limit(amount: str, budget: float, same_versions: bool) -> float:
    """What is allowed of an amount.

    Exactly the budget; half as much again where another version of the compiler makes
    other programs; of seconds three times as much and two more, for slow processors.
    """
    if amount == SECONDS:
        return 3 * budget + 2
    return budget if same_versions else math.ceil(1.5 * budget) + 10


def exceeded(budget: dict, found: dict, same_versions: bool = True) -> list[str]:
    """A sentence for each amount that a program takes too much of."""
    if "failed" in found:
        return [f"it does not compile: {found['failed']}"]
    taken = amounts(found)
    limits = {name: limit(name, budget[name], same_versions) for name in taken}
    return [
        f"{name} {taken[name]:,} where {limits[name]:,} are allowed"
        for name in taken
        if taken[name] > limits[name]
    ]


def lower(
    budgets: dict, measured: dict[str, dict], versions: dict[str, str], names: list[str]
) -> dict:
    """The budgets of one kind of device after a measurement.

    Each amount that was beaten is lowered, seconds only if clearly; none is raised.
    Programs that have no budget get one, and other versions a whole set of new ones.

    Args:
        budgets: ``versions`` and ``programs``, or empty.
        measured: what was measured of some programs; the others, and those that did not
            compile, keep their budgets.
        versions: those that they were compiled with.
        names: of all the programs that there are.
    """
    before = budgets["programs"] if budgets.get("versions") == versions else {}
    after = {}
    for name in names:
        found = measured.get(name, {"failed": "not measured"})
        if "failed" not in found:
            taken = amounts(found)
            after[name] = {
                amount: _lower(amount, before.get(name, taken)[amount], taken[amount])
                for amount in taken
            }
        elif name in before:
            after[name] = before[name]
    return {"versions": versions, "programs": after}


def _lower(amount: str, budget: float, taken: float) -> float:
    clearly = 0.7 * budget if amount == SECONDS else budget
    return taken if taken < clearly else budget
