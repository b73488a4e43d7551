from pathlib import Path

from rich.console import Console
from rich.table import Table

from .report import Check, Report


def print_environment(environment: dict[str, str]) -> None:
    """One line that says what the numbers below were measured with."""
    line = "  ".join(f"[dim]{name}[/dim] {value}" for name, value in environment.items())
    Console(highlight=False).print(f"[bold]The lrjax tour[/bold]\n{line}")


def print_report(report: Report, seconds: float, out: Path) -> None:
    """The table of one part, its checks, and where its pictures are."""
    console = Console(highlight=False)
    console.print(f"\n[bold]{report.title}[/bold]  [dim]{seconds:.1f} s[/dim]")
    if report.skipped:
        console.print(f"[yellow]skipped:[/yellow] {report.skipped}", soft_wrap=True)
        return
    if report.rows:
        table = Table(header_style="bold", show_edge=False)
        for i, column in enumerate(report.rows[0]):
            table.add_column(column, justify="right" if i else "left")
        for row in report.rows:
            table.add_row(*map(_cell, row.values()))
        console.print(table)
    for check in report.checks:
        console.print(_verdict(check), soft_wrap=True)
    for figure in report.figures:
        console.print(f"[dim]picture:[/dim] {out / figure}", soft_wrap=True)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _verdict(check: Check) -> str:
    mark = "[green]ok    [/green]" if check.ok else "[red]MISSED[/red]"
    bound = f"{'at most' if check.at_most else 'at least'} {check.bound:.4g}"
    return f"{mark} {check.claim}: {check.value:.4g} ({bound})"
