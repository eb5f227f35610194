"""`tfgptopt quantize`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from tfgptopt.cli.shared import (
    FILE_SUFFIXES,
    Force,
    Resume,
    console,
    load,
    load_libraries,
    perplexity_of,
    print_size,
    read_text,
)

if TYPE_CHECKING:
    import keras

    from tfgptopt.quantization.post_training import Method

# Windows that calibration reads at once.
_AT_ONCE = 4
_TOKENS = 512


def quantize(
    preset: Annotated[
        str, typer.Argument(help="KerasHub preset (folder, name, hf://) or Hugging Face folder.")
    ],
    path: Annotated[Path, typer.Argument(help="The .tflite or .litertlm file, or a folder.")],
    spec: Annotated[
        str, typer.Option(help="int8, int4, or int4:32 in blocks of 32 inputs.")
    ] = "int8",
    method: Annotated[
        str,
        typer.Option(help="rtn, mse, gptq, awq, smoothquant, rotation, several with +, or auto."),
    ] = "auto",
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text or records to calibrate with.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to calibrate with.", min=1)] = 32,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure perplexity on: of the model before, of the file after."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window. [512, or all that the context has]")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Positions of the KV cache. Default: all of the model.")
    ] = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Quantize a model without training, and export it."""
    load_libraries()
    import tfgptopt
    from tfgptopt.exporting.formats import format_of
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.stages import checkpoints_beside
    from tfgptopt.quantization import report
    from tfgptopt.quantization.specs import parse_spec

    parsed = parse_spec(spec)
    checkpoints = checkpoints_beside(check_target(path, force), force, resume)
    options = {} if context_length is None else {"context_length": context_length}
    format = format_of(path, options)
    model = load(preset)
    sequence_length = _sequence_length(model, sequence_length, context_length)
    data = held_out = before = None
    if text:
        held_out = read_text(text, model, preset, sequence_length, 2, validation_share=1.0)
    if calibration:
        corpus = read_text(calibration, model, preset, sequence_length, _AT_ONCE)
        data = corpus.train.take(-(-windows // _AT_ONCE))
    if held_out is not None:
        before = perplexity_of(model, held_out.validation)
    names = cast("list[Method]", method.split("+"))
    chosen = names[0] if len(names) == 1 else names
    if checkpoints.exists():
        console.print(f"Going on from {escape(str(checkpoints))}")
    tfgptopt.quantize(model, parsed, chosen, data, checkpoints=checkpoints)
    console.print(report(model))
    tfgptopt.export(model, path, format, force)
    shutil.rmtree(checkpoints, ignore_errors=True)
    print_size(path)
    if before is not None and held_out is not None:
        measured = path if path.suffix in FILE_SUFFIXES else model
        after = perplexity_of(measured, held_out.validation)
        console.print(
            f"perplexity {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%}), on "
            f"{held_out.validation_tokens:,} tokens"
        )


def _sequence_length(model: keras.Model, wanted: int | None, context_length: int | None) -> int:
    """Returns how many tokens a window has.

    Raises:
        ValueError: If they do not fit into the context.
    """
    positions = getattr(model.backbone, "max_sequence_length", None)
    most = context_length or positions
    if wanted is not None and most is not None and wanted > most:
        raise ValueError(
            f"--sequence-length must be at most {most}, the positions of the context. "
            f"Received: {wanted}"
        )
    return wanted or min(_TOKENS, most or _TOKENS)
