"""The figures page: what every benchmark claims, what was measured, and what missed.

Written from ``results/*.json`` alone, so that no figure in the documents is typed by hand.
"""

import ast
import json
import re
from pathlib import Path


HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PAGE = DOCS / "benchmarks.md"
MISSES = DOCS / "_misses.md"
# <!-- script: claim --> 1.5 <!-- / -->: a figure of the results, quoted in running text
QUOTE = re.compile(r"(<!-- (\w+): (.+?) -->)(.*?)(<!-- / -->)", re.DOTALL)

HEAD = """\
# Benchmarks

<!-- Written by `python benchmarks/run.py --table`: change the scripts, not this page. -->

Every script in `benchmarks/` asks one question, declares the bounds that its answer has to
keep, and exits with status 1 when one is broken. Methods that are compared run in turn in
one process, warm, and what is reported is the median. `python benchmarks/run.py` runs them
all, with a word those that have it in their name; with `--table` it writes this page from
what they stored in `benchmarks/results/`.

{kept} of {total} bounds are kept. The others are marked **missed**, and explained
[at the end](#what-misses-its-bound-and-why).
"""


def results() -> dict[str, dict]:
    """What each script stored, by the name of the script."""
    paths = sorted((HERE / "results").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def page() -> str:
    """The whole page."""
    stored = results()
    bounds = [bound for result in stored.values() for bound in result["bounds"]]
    kept = sum(bound["ok"] for bound in bounds)
    sections = [_section(name, result) for name, result in stored.items()]
    head = HEAD.format(kept=kept, total=len(bounds))
    return "\n".join([head, *sections, MISSES.read_text()])


def refreshed(text: str) -> str:
    """``text`` with every figure that it quotes as it stands in the results."""
    stored = results()

    def measured(match):
        mark, script, claim, _, end = match.groups()
        values = {bound["claim"]: bound["value"] for bound in stored[script]["bounds"]}
        if claim not in values:
            raise KeyError(f"{script} has no claim {claim!r}, but: {', '.join(values)}")
        return f"{mark}{_number(values[claim])}{end}"

    return QUOTE.sub(measured, text)


def quoting() -> list[Path]:
    """The hand-written documents, which may quote figures."""
    written = [path for path in sorted(DOCS.glob("*.md")) if path != PAGE]
    return [HERE.parent / "README.md", *written]


def write() -> None:
    """Write the page and refresh the figures that other documents quote."""
    PAGE.write_text(page())
    for path in quoting():
        path.write_text(refreshed(path.read_text()))


def _section(name: str, result: dict) -> str:
    source = (HERE / f"{name}.py").read_text()
    question = ast.get_docstring(ast.parse(source)).split("\n\n")[0]
    claims = [
        {"claim": bound["claim"], "measured": bound["value"], "bound": _limit(bound)}
        for bound in result["bounds"]
    ]
    rows = "\n".join(_table(rows) for rows in _alike(result["rows"]))
    return (
        f"## {name}\n\n{question}\n\n{_table(claims)}\n"
        f"<details><summary>all rows</summary>\n\n{rows}\n</details>\n\n"
        f"{_origin(result['environment'])}\n"
    )


def _limit(bound: dict) -> str:
    sign, limit = (
        ("≤", bound["at most"]) if "at most" in bound else ("≥", bound["at least"])
    )
    return f"{sign} {_number(limit)}" + ("" if bound["ok"] else ", **missed**")


def _alike(rows: list[dict]) -> list[list[dict]]:
    """Rows with the same columns, together."""
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    return list(kinds.values())


def _table(rows: list[dict]) -> str:
    names = [name.replace("_", " ") for name in rows[0]]
    lines = [names, ["---"] * len(names), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(item)}" for key, item in value.items())
    return str(value).replace("|", r"\|")


def _number(value: float) -> str:
    """Three digits of a fraction, all of a count."""
    whole = isinstance(value, int) or 1000 <= abs(value) < 1e6
    return f"{value:,.0f}" if whole else f"{value:.3g}"


def _origin(environment: dict) -> str:
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items() if version
    )
    device = environment["device"]
    if environment["platform"] == "cpu":
        device = f"{environment['cores']} cores of {environment['processor']}"
    return (
        f"*{environment['date']}, commit {environment['commit']}, on {device}; "
        f"Python {environment['python']}, {versions}.*"
    )
