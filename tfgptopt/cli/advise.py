"""`tfgptopt advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfgptopt.cli.shared import console


def advise(
    preset: Annotated[
        Path | None, typer.Option(help="Folder of a KerasHub preset, for its shape.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    width: Annotated[int | None, typer.Option(help="Numbers of a token between layers.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Number of tokens.")] = 50257,
    feedforward: Annotated[
        int | None, typer.Option(help="Neurons of a layer. Default: four times the width.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Heads of attention.")] = 8,
    gated: Annotated[bool, typer.Option("--gated", help="Gated neurons, as in Llama.")] = False,
    untied: Annotated[bool, typer.Option("--untied", help="A head apart from the table.")] = False,
    depth: Annotated[int, typer.Option(help="Tokens before the new ones.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows of a training step.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 128,
) -> None:
    """Say what this machine can expect of a shape, before anything is trained: estimates."""
    import json

    from rich.table import Table

    from tfgptopt.backend import require_tensorflow
    from tfgptopt.terminal.quiet import quiet_native_logs

    require_tensorflow()
    with console.status("Measuring the machine"), quiet_native_logs():
        from tfgptopt.evaluation.advising import (
            Shape,
            estimate_files,
            estimate_on_gpu,
            estimate_training,
            shape_of,
        )
        from tfgptopt.evaluation.gpus import GPUS
        from tfgptopt.evaluation.machine import measure_machine

        if preset is not None:
            file = preset / "config.json"
            if not file.is_file():
                raise FileNotFoundError(f"The preset folder '{preset}' has no config.json.")
            shape = shape_of(json.loads(file.read_text("utf-8")).get("config", {}))
        elif layers is None or width is None:
            raise ValueError("Give a shape: --layers and --width, or --preset.")
        else:
            shape = Shape(layers, width, vocabulary, feedforward, heads, 1.0, gated, not untied)
        machine = measure_machine()
    gpus = f", {', '.join(machine.gpus)}" if machine.gpus else ", no GPU"
    console.print(
        f"{machine.processor}: {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"{machine.bandwidth / 1e9:.0f} GB/s from memory, {machine.flops / 1e12:.2f} TFLOP/s in "
        f"float32{gpus}"
    )
    console.print(f"Shape: {shape.parameters / 1e6:.1f} M weights. Estimates, not measurements:")
    table = Table(padding=(0, 1))
    for heading in ("file", "MB", f"tokens/s at {depth}, at most"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    for one in estimate_files(shape, machine, depth):
        table.add_row(one.spec, f"{one.bytes / 1e6:.1f}", f"{one.tokens_per_second:,.0f}")
    console.print(table)
    training = estimate_training(shape, machine, batch_size, sequence_length)
    console.print(
        f"A training step of {batch_size} x {sequence_length} tokens, float32, AdamW: "
        f"{training.seconds:.2f} s and {training.bytes / 1e9:.1f} GB at least"
        + ("" if training.fits else ", more than this machine has")
    )
    sheet = Table(padding=(0, 1))
    for heading in ("GPU, by its data sheet", "GB, at least", "ms a step, at least", ""):
        sheet.add_column(heading, justify="left" if heading.startswith("GPU") else "right")
    for gpu in GPUS:
        step = estimate_on_gpu(shape, gpu, batch_size, sequence_length)
        fits = "" if step.fits else "does not fit"
        sheet.add_row(gpu.name, f"{step.bytes / 1e9:.1f}", f"{1e3 * step.seconds:,.1f}", fits)
    console.print("The same step in mixed precision; estimates too, never measured:")
    console.print(sheet)
