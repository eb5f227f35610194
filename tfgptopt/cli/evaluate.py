"""`tfgptopt evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tfgptopt.cli.shared import (
    FILE_SUFFIXES,
    Force,
    console,
    load,
    load_libraries,
    print_corpus,
    read_text,
)


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help=".tflite and .litertlm files and presets, of one tokenizer.")
    ],
    text: Annotated[list[str], typer.Option(help="Text or records to measure on, all of it.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Preset to tokenize with. Default: the first preset given.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for the speed.", min=1)] = 32,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare the others with. Default: the first.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
    force: Force = False,
) -> None:
    """Measure size, quality and speed of files and presets, side by side."""
    load_libraries()
    import tfgptopt
    from tfgptopt.evaluation.results import save_results
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.reporting import quality_table, results_table

    if json is not None:
        check_target(json, force)

    loaded: dict[str, Any] = {}
    presets: dict[str, Any] = {}
    for name in models:
        short = Path(name).name if Path(name).name not in loaded else name
        if name.endswith(FILE_SUFFIXES):
            loaded[short] = Path(name)
        else:
            loaded[short] = presets[name] = load(name)
    reader = tokenizer or next(iter(presets), None)
    if reader is None:
        raise ValueError("Give a preset with a tokenizer among the models, or with --tokenizer.")
    reading = presets[reader] if reader in presets else load(reader)
    corpus = read_text(text, reading, reader, sequence_length, 4, validation_share=1.0)
    print_corpus(corpus)
    names = dict(zip(models, loaded, strict=True))
    compared = None if reference is None else names.get(reference, reference)
    results = tfgptopt.evaluate(
        loaded, corpus.validation, new_tokens=new_tokens, reference=compared
    )
    console.print(results_table(results))
    console.print(quality_table(results))
    console.print("Below a number: where 95 % of windows drawn anew would put it.")
    if json is not None:
        about = {"text": text, "sequence_length": sequence_length, "reference": compared}
        save_results(results, json, about)
