"""`tfgptopt report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfgptopt.cli.shared import Force, console, load_libraries


def report(
    results: Annotated[
        list[Path], typer.Argument(help="Files of `evaluate --json`, or a job's results.json.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="What it is called.")] = "What was measured",
    force: Force = False,
) -> None:
    """Make one page, for a browser, of what was measured in one or more runs."""
    load_libraries()
    from tfgptopt.evaluation.results import load_results
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.reporting import headline, write_report

    check_target(out, force)
    runs = [load_results(path) for path in results]
    write_report(runs, out, title)
    for run in runs:
        for line in headline(run):
            console.print(f"- {line}")
    console.print(f"Report: {out}")
