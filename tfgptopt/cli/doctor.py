"""`tfgptopt doctor`."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tfgptopt.terminal.quiet import quiet_native_logs


def doctor() -> None:
    """Print versions, devices, kernels, the cache folder and extras, and what to do."""
    from tfgptopt.job.doctor import examine

    with quiet_native_logs():
        findings = examine()
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = "[red]![/red]" if finding.problem else "[green]ok[/green]"
        table.add_row(mark, finding.name, escape(finding.found))
    console = Console(highlight=False)
    console.print(table)
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        console.print(f"[red]{escape(finding.name)}[/red]: {escape(str(finding.problem))}")
    if problems:
        raise typer.Exit(1)
    console.print("All is well.")
