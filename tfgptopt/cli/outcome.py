"""Prints what a job did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tfgptopt.cli.shared import console

if TYPE_CHECKING:
    from tfgptopt.evaluation import Result
    from tfgptopt.job.outcome import Outcome


def print_outcome(outcome: Outcome, out: Path) -> None:
    """Prints the table of results, what follows from them, and where the files are."""
    from tfgptopt.job.reporting import headline
    from tfgptopt.job.tables import results_table

    first, *others = headline(outcome.as_run())
    console.print(results_table(outcome.results))
    console.print(f"[bold]{escape(first)}[/bold]")
    for line in others:
        console.print(f"- {line}")
    console.print(_side_by_side(outcome.results[0], outcome.results[-1]))
    console.print(f"\nReport: {out / 'report.html'}")
    console.print(f"Try it: tfgptopt generate {out / 'model.tflite'} 'import os'")


def _side_by_side(before: Result, after: Result) -> Table:
    """Returns what both make of the first prompt that both continued."""
    table = Table(expand=True, padding=(0, 1))
    for result in (before, after):
        table.add_column(result.name, ratio=1, overflow="fold")
    common = [prompt for prompt in before.continuations if prompt in after.continuations]
    for prompt in common[:1]:
        table.add_row(*(_continued(prompt, one.continuations[prompt]) for one in (before, after)))
    return table


def _continued(prompt: str, text: str) -> Text:
    """Returns a text whose prompt can be told from what the model made of it."""
    return Text.assemble((prompt, "bold"), text.removeprefix(prompt))
