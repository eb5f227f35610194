"""`tfgptopt monitoring`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfgptopt.monitoring import write_dashboards


def monitoring(
    out: Annotated[Path, typer.Argument(help="Folder; files of the same names are replaced.")],
    target: Annotated[
        list[str] | None,
        typer.Option(help="HOST:PORT of a training or server; may be given several times."),
    ] = None,
) -> None:
    """Write a Grafana dashboard, alert rules and a configuration for Prometheus."""
    for path in write_dashboards(out, target):
        typer.echo(path)
    typer.echo(f"prometheus --config.file={out / 'prometheus.yml'}")
