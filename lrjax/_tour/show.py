import textwrap
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from .report import Check, Report


def print_environment(environment: dict[str, str]) -> None:
    """What the numbers below were measured with."""
    console = Console(highlight=False)
    console.print("[bold]The lrjax tour[/bold]")
    items = (f"[dim]{name}[/dim] {value}" for name, value in environment.items())
    console.print(Columns(items, padding=(0, 2)))


def print_report(report: Report, seconds: float, out: Path) -> None:
    """The table of one part, its checks, how long it took and where its pictures are."""
    console = Console(highlight=False)
    console.print(f"\n[bold]{report.title}[/bold]")
    if report.skipped:
        console.print(f"[yellow]skipped:[/yellow] {report.skipped}", soft_wrap=True)
        return
    if report.rows:
        console.print(_table(report.rows))
    if report.checks:
        console.print(_verdicts(report.checks))
    console.print(f"[dim]{seconds:.1f} s[/dim]")
    for figure in report.figures:
        console.print(f"[dim]picture:[/dim] {out / figure}", soft_wrap=True)


def _table(rows: tuple[dict[str, object], ...]) -> Table:
    """Numbers to the right, and headings broken between words to the width they need."""
    table = Table(header_style="bold", show_edge=False)
    for i, name in enumerate(rows[0]):
        cells = [_cell(row[name]) for row in rows]
        width = max(map(len, [*cells, *name.split()]))
        heading = textwrap.fill(name, width)
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _verdicts(checks: tuple[Check, ...]) -> Table:
    """One line a check: the verdict, the claim, the measured value and its bound."""
    grid = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "left"):
        grid.add_column(justify=justify)
    for check in checks:
        mark = "[green]ok[/green]" if check.ok else "[red]MISSED[/red]"
        bound = f"{'at most' if check.at_most else 'at least'} {_cell(check.bound)}"
        grid.add_row(mark, check.claim, _cell(check.value), bound)
    return grid


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
