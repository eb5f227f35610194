"""`tfgptopt tune`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tfgptopt.cli.shared import console, load, load_libraries, print_corpus, read_text

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def tune(
    text: Annotated[list[str], typer.Argument(help="Text or records to calibrate and train on.")],
    preset: Annotated[str, typer.Option(help="KerasHub preset: a folder or a name.")],
    max_size: Annotated[str | None, typer.Option(help="Largest file, such as 40MB.")] = None,
    max_download: Annotated[
        str | None, typer.Option(help="Largest file under gzip, such as 20MB.")
    ] = None,
    min_speed: Annotated[float | None, typer.Option(help="Least tokens per second.")] = None,
    max_rise: Annotated[
        str | None, typer.Option(help="Most rise of perplexity, such as 3%.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time that all trials may take.")] = 15.0,
    steps: Annotated[
        list[int] | None, typer.Option(help="Steps of training, in rising order. [60 180 540]")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    out: Annotated[Path, typer.Option(help="Folder, which the same command goes on from.")] = Path(
        "tfgptopt-tuned"
    ),
) -> None:
    """Choose a recipe by measuring: from cheap to dear, until a file meets the limits."""
    load_libraries()
    from tfgptopt.job.search import Limits
    from tfgptopt.job.tuning import Tuning, verdict
    from tfgptopt.job.tuning import tune as run

    limits = Limits(
        None if max_size is None else parse_bytes(max_size),
        None if max_download is None else parse_bytes(max_download),
        min_speed,
        None if max_rise is None else parse_share(max_rise),
    )
    if limits == Limits():
        raise ValueError("Give a limit: --max-size, --max-download, --min-speed or --max-rise.")
    tuning = Tuning(60 * minutes, tuple(steps or (60, 180, 540)), learning_rate)
    model = load(preset)
    corpus = read_text(text, model, preset, sequence_length, batch_size)
    print_corpus(corpus)
    found = run(model, corpus, limits, out, tuning, console=console)
    from tfgptopt.job.tables import trials_table

    console.print(trials_table(found))
    for name, reason in found.skipped.items():
        console.print(f"not tried: {name}, {reason}", markup=False)
    console.print(verdict(found, limits), markup=False)
    if found.kept is not None:
        console.print(f"File: {out / 'model.tflite'}\nReport: {out / 'report.html'}", markup=False)


def parse_bytes(text: str) -> int:
    """Returns a number of bytes from words such as `40MB`.

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"([\d.]+) ?([KMG]?B?)", text.strip().upper())
    if found is None or found[1].count(".") > 1:
        raise ValueError(f"Expected a size such as 40MB or 800KB. Received: {text!r}")
    unit = found[2] if not found[2] or found[2].endswith("B") else f"{found[2]}B"
    return int(float(found[1]) * _UNITS[unit])


def parse_share(text: str) -> float:
    """Returns a share from words such as `3%` or `0.03`.

    Raises:
        ValueError: If it is none.
    """
    try:
        stripped = text.strip()
        return float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        raise ValueError(f"Expected a share such as 3% or 0.03. Received: {text!r}") from None
