"""`tfgptopt bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tfgptopt.cli.shared import console, load, load_libraries

if TYPE_CHECKING:
    import keras_hub


def bench(
    files: Annotated[list[Path], typer.Argument(help="Exported files: .tflite or .litertlm.")],
    preset: Annotated[
        str | None, typer.Option(help="Keras model to compare with: a KerasHub preset.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 96,
    runs: Annotated[int, typer.Option(help="Runs whose median counts.", min=1)] = 7,
) -> None:
    """Measure the speed of exported files, and of Keras' compiled generate, in one run."""
    from rich.table import Table

    from tfgptopt.generation.measuring import measure_in_fresh_process

    with console.status("Loading, reading and decoding in a fresh process for each file"):
        alone = {file: measure_in_fresh_process(file) for file in files}
    table = Table("file", padding=(0, 1))
    for heading in ("load s", "prefill tok/s", "decode ms at", "peak RSS MB"):
        table.add_column(heading, justify="right")
    for file, found in alone.items():
        decode = ", ".join(f"{depth}: {ms:.2f}" for depth, ms in found.decode_ms.items())
        numbers = (f"{found.load_seconds:.2f}", f"{found.prefill_tokens_per_second:,.0f}")
        table.add_row(str(file), *numbers, decode, f"{found.peak_rss_bytes / 1e6:.0f}")
    console.print(table)
    load_libraries()
    from tfgptopt.generation import TFLiteCausalLM

    models: dict[str, TFLiteCausalLM | keras_hub.models.CausalLM] = {
        str(file): TFLiteCausalLM(file) for file in files
    }
    shortest = min(lm.context_length for lm in models.values())
    prompt = list(range(min(16, shortest // 2)))
    new_tokens = min(new_tokens, shortest - len(prompt))
    if preset:
        with console.status(f"Loading {escape(preset)}"):
            models = {preset: load(preset), **models}
    from tfgptopt.evaluation.speed import compare_speed

    with console.status(f"Generating {new_tokens} tokens {runs} times with each, in turns"):
        speeds = compare_speed(models, prompt, new_tokens, runs)
    slowest = min(speed.tokens_per_second for speed in speeds.values())
    table = Table("model", padding=(0, 1))
    for heading in ("1st token ms", "tok/s", "times"):
        table.add_column(heading, justify="right")
    for name, speed in speeds.items():
        rate = speed.tokens_per_second
        table.add_row(name, f"{speed.first_token_ms:.1f}", f"{rate:,.0f}", f"{rate / slowest:.1f}")
    console.print(table)
