"""Prints what a job did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tfgptopt.cli.shared import console

if TYPE_CHECKING:
    from tfgptopt.job.outcome import Outcome


def print_outcome(outcome: Outcome, out: Path) -> None:
    """Prints the table of results, what follows from them, and where the files are."""
    from tfgptopt.job.reporting import headline
    from tfgptopt.job.tables import results_table

    console.print(results_table(outcome.results))
    for line in headline(outcome.as_run()):
        console.print(f"- {line}")
    console.print(f"\nReport: {out / 'report.html'}")
    console.print(f"Try it: tfgptopt generate {out / 'model.tflite'} 'import os'")
