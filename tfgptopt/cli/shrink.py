"""`tfgptopt shrink`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tfgptopt.cli.shared import (
    FILE_SUFFIXES,
    Force,
    console,
    load,
    load_libraries,
    perplexity_of,
    print_size,
    read_text,
)

if TYPE_CHECKING:
    import keras

# Windows that tell which parts matter, and how many at once.
_CALIBRATION_ROWS, _AT_ONCE = 64, 4


def _cut(text: str) -> int | float:
    """Returns a number of parts, or with a point a share of them."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise typer.BadParameter(
            f"a number such as 6, or a share such as 0.5. Received: {text!r}"
        ) from None


def _option(words: str) -> object:
    return typer.Option(help=f"{words} to keep: a number, or a share such as 0.5.", parser=_cut)


def shrink(
    preset: Annotated[
        str, typer.Argument(help="KerasHub preset (folder, name, hf://) or Hugging Face folder.")
    ],
    path: Annotated[
        Path,
        typer.Argument(help="Folder of the smaller preset, or a .tflite or .litertlm file."),
    ],
    calibration: Annotated[
        list[str], typer.Option(help="Text or records that show which parts matter.")
    ],
    parameters: Annotated[
        float | None, typer.Option(help="Share of the weights to keep; the shape is searched.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Share of the time per token to keep, likewise.")
    ] = None,
    depth: Annotated[float | None, _option("Decoder layers")] = None,
    heads: Annotated[float | None, _option("Query heads of each layer")] = None,
    kv_heads: Annotated[float | None, _option("Heads of keys and values")] = None,
    feedforward: Annotated[float | None, _option("Neurons of each layer")] = None,
    width: Annotated[float | None, _option("Features of the residual stream")] = None,
    vocabulary: Annotated[float | None, _option("Tokens")] = None,
    context: Annotated[float | None, _option("Positions")] = None,
    experts: Annotated[float | None, _option("Experts of a mixture")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to measure perplexity on, before and after.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    force: Force = False,
) -> None:
    """Make a smaller model of the most important parts of a larger one; train it afterwards."""
    load_libraries()
    import tfgptopt
    from tfgptopt.data import save_preset
    from tfgptopt.file.replacing import check_target, replacing
    from tfgptopt.shrinking.technique import Shrink

    target = check_target(path, force)
    settings = {
        "depth": depth,
        "heads": heads,
        "kv_heads": kv_heads,
        "feedforward": feedforward,
        "width": width,
        "vocabulary": vocabulary,
        "context": context,
        "experts": experts,
        "parameters": parameters,
        "latency": latency,
    }
    Shrink(**settings)  # type: ignore[arg-type]  # Raises before anything is loaded.
    if vocabulary is not None and text:
        raise ValueError(
            "Perplexities of different vocabularies do not compare: leave out --text or "
            "--vocabulary."
        )
    model = load(preset)
    corpus = read_text(calibration, model, preset, sequence_length, _AT_ONCE)
    held_out = None
    if text:
        held_out = read_text(text, model, preset, sequence_length, 2, 1.0).validation
    data = corpus.train.take(_CALIBRATION_ROWS // _AT_ONCE)
    small = tfgptopt.shrink(model, calibration=data, **settings)  # type: ignore[arg-type]
    console.print(_table(model, small))
    if target.suffix in FILE_SUFFIXES:
        tfgptopt.export(small, target, overwrite=force)
    else:
        with replacing(target) as folder:
            save_preset(small, folder)
    print_size(target)
    if held_out is not None:
        before, after = (perplexity_of(one, held_out) for one in (model, small))
        console.print(
            f"perplexity {before:.4f} before, {after:.4f} after, untrained: train it, best with "
            "the large model as its teacher (`tfgptopt optimize` with `distill` in the recipe)"
        )


def _table(model: keras.Model, small: keras.Model) -> Table:
    """Returns shapes and sizes, before and after."""
    old, new = _sizes(model), _sizes(small)
    table = Table("", padding=(0, 1))
    for heading in ("before", "after", "kept"):
        table.add_column(heading, justify="right")
    for name, before in old.items():
        after = new[name]
        if before:
            table.add_row(
                name.replace("_", " "), f"{before:,}", f"{after:,}", f"{after / before:.0%}"
            )
    return table


def _sizes(model: keras.Model) -> dict[str, int]:
    """Returns what a model has of all that can be cut, and its weights."""
    from tfgptopt.families.mixtures import experts_of
    from tfgptopt.shrinking.shapes import count_parameters, shape_of

    if experts_of(model):
        return {"experts": model.backbone.num_experts, "weights": model.count_params()}
    shape = shape_of(model)
    return {**dataclasses.asdict(shape), "weights": count_parameters(model, shape)}
