"""`tfgptopt quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from tfgptopt.cli.shared import Force, console, load_libraries, load_preset, print_size

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from tfgptopt.data import Corpus
    from tfgptopt.quantization.post_training import Method

# Windows that calibration reads.
_CALIBRATION_ROWS = 32


def quantize(
    preset: Annotated[
        str, typer.Argument(help="KerasHub preset (folder, name, hf://) or Hugging Face folder.")
    ],
    path: Annotated[Path, typer.Argument(help="The .tflite or .litertlm file, or a folder.")],
    spec: Annotated[
        str, typer.Option(help="int8, int4, or int4:32 in blocks of 32 inputs.")
    ] = "int8",
    method: Annotated[
        str, typer.Option(help="rtn, mse, gptq, awq, smoothquant, several with +, or auto.")
    ] = "auto",
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text or records to calibrate with.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to measure perplexity on, before and after.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    context_length: Annotated[
        int | None, typer.Option(help="Positions of the KV cache. Default: all of the model.")
    ] = None,
    force: Force = False,
) -> None:
    """Quantize a model without training, and export it."""
    load_libraries()
    import tfgptopt
    from tfgptopt.data import load_corpus, template_of
    from tfgptopt.exporting.formats import format_of
    from tfgptopt.file.replacing import check_target
    from tfgptopt.quantization import report
    from tfgptopt.quantization.specs import parse_spec

    check_target(path, force)
    parsed = parse_spec(spec)
    options = {} if context_length is None else {"context_length": context_length}
    format = format_of(path, options)
    with console.status(f"Loading {escape(preset)}"):
        model = load_preset(preset)
    tokenizer = getattr(model.preprocessor, "tokenizer", None)
    if tokenizer is None and (calibration or text):
        raise ValueError(f"The preset '{preset}' has no tokenizer to read text with.")

    def corpus_of(sources: list[str], rows: int) -> Corpus:
        return load_corpus(
            sources,
            tokenizer=tokenizer,
            chat_template=template_of(model),
            sequence_length=sequence_length,
            batch_size=rows,
        )

    data = corpus_of(calibration, 4).train.take(_CALIBRATION_ROWS // 4) if calibration else None
    held_out = corpus_of(text, 2).validation if text else None
    before = _perplexity(model, held_out) if held_out is not None else None
    names = cast("list[Method]", method.split("+"))
    tfgptopt.quantize(model, parsed, names[0] if len(names) == 1 else names, data)
    console.print(report(model))
    with console.status(f"Writing {path}"):
        tfgptopt.export(model, path, format, force)
    print_size(path)
    if before is not None and held_out is not None:
        after = _perplexity(model, held_out)
        change = after / before - 1
        console.print(f"perplexity {before:.4f} before, {after:.4f} after ({change:+.2%})")


def _perplexity(model: keras.Model, held_out: tf.data.Dataset) -> float:
    """Returns the perplexity of a model on held-out windows."""
    from tfgptopt.data import tokens_as_input
    from tfgptopt.evaluation.loss import keras_loss, perplexity

    with console.status("Measuring perplexity"), tokens_as_input(model):
        return perplexity(keras_loss(model, held_out))
