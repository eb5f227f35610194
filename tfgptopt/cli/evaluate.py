"""`tfgptopt evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tfgptopt.cli.shared import console, load_libraries, load_preset, print_corpus


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help=".tflite and .litertlm files and presets, of one tokenizer.")
    ],
    text: Annotated[list[str], typer.Option(help="Text or records to measure on.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Preset to tokenize with. Default: the first preset given.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for the speed.", min=1)] = 32,
) -> None:
    """Measure size, perplexity and speed of files and presets, side by side."""
    load_libraries()
    import tfgptopt
    from tfgptopt.data import load_corpus, template_of
    from tfgptopt.job.reporting import results_table

    loaded: dict[str, Any] = {}
    for name in models:
        short = Path(name).name if Path(name).name not in loaded else name
        if name.endswith((".tflite", ".litertlm")):
            loaded[short] = Path(name)
            continue
        with console.status(f"Loading {escape(name)}"):
            loaded[short] = load_preset(name)
    keras_models = [one for one in loaded.values() if not isinstance(one, Path)]
    reader = load_preset(tokenizer) if tokenizer else next(iter(keras_models), None)
    if reader is None or reader.preprocessor is None:
        raise ValueError("Give a preset with a tokenizer among the models, or with --tokenizer.")
    corpus = load_corpus(
        text,
        tokenizer=reader.preprocessor.tokenizer,
        chat_template=template_of(reader),
        sequence_length=sequence_length,
        batch_size=4,
        validation_share=0.5,
    )
    print_corpus(corpus)
    with console.status("Measuring, in turns"):
        results = tfgptopt.evaluate(loaded, corpus.validation, new_tokens=new_tokens)
    console.print(results_table(results))
