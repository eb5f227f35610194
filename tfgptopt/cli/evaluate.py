"""`tfgptopt evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from tfgptopt.evaluation.results import Result


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help=".tflite, .litertlm, .gguf, SavedModels and presets."),
    ],
    text: Annotated[
        list[str], typer.Option(help="Text or records to measure on, all of it; by folder.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Preset whose tokenizer models without one get.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    stride: Annotated[
        int | None, typer.Option(help="Tokens that a window moves on. Default: packed windows.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for the speed.", min=1)] = 32,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare the others with. Default: the first.")
    ] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option(help="JSON Lines of question, choices, answer, or of prompt and references."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text that each continues, for the report.")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(help="occlusion, shap or lime: what the next token of each prompt hangs on."),
    ] = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="Also load each in a process of its own.")
    ] = False,
    energy: Annotated[
        bool, typer.Option("--energy", help="Also joules of a token, where they are counted.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
    force: Force = False,
) -> None:
    """Measure size, quality and speed of models, files and presets, side by side."""
    load_libraries()
    import tfgptopt
    from tfgptopt.data.presets import reading_tokenizer
    from tfgptopt.evaluation import Windows
    from tfgptopt.evaluation.machine import measure_machine
    from tfgptopt.evaluation.results import Run, save_results
    from tfgptopt.evaluation.tasks import read_task
    from tfgptopt.file.replacing import check_target

    if json is not None:
        check_target(json, force)
    method = _method(explain, prompt)
    tasks = [read_task(path) for path in task or ()]
    windows = Windows(sequence_length, stride)
    loaded: dict[str, Any] = {}
    for name in models:
        short = Path(name).name if Path(name).name not in loaded else name
        loaded[short] = Path(name) if _is_artifact(name) else load(name)
    reading = None if tokenizer is None else load(tokenizer)
    data, records = _data(text, loaded, reading, tokenizer or models[0], windows)
    names = dict(zip(models, loaded, strict=True))
    compared = None if reference is None else names.get(reference, reference)
    results = tfgptopt.evaluate(
        loaded,
        data,
        new_tokens=new_tokens,
        reference=compared,
        windows=None if records else windows,
        tasks=tasks,
        prompts=prompt or (),
        processes=processes,
        energy=energy,
        tokenizer=None if reading is None else reading_tokenizer(reading, str(tokenizer)),
        explanation=method,
    )
    _print(results)
    if json is not None:
        about = {"text": text, "windows": windows.describe(), "sequence_length": sequence_length}
        first = next(iter(loaded)) if len(loaded) > 1 else None
        run = Run(tuple(results), compared or first, about, measure_machine())
        save_results(run, json)


def _method(name: str | None, prompt: list[str] | None) -> Any:
    """Returns a method of explanation, if one is asked for.

    Raises:
        ValueError: If it is none, or there is no prompt.
    """
    from typing import get_args

    from tfgptopt.evaluation.explain import Method

    if name is not None and name not in get_args(Method):
        raise ValueError(
            f"--explain must be one of {', '.join(get_args(Method))}. Received: {name}"
        )
    if name is not None and not prompt:
        raise ValueError("--explain explains prompts: give one at least, with --prompt.")
    return name


def _is_artifact(name: str) -> bool:
    """Returns whether a name is that of a file or a SavedModel, and not of a preset."""
    path = Path(name)
    return (
        name.endswith((*FILE_SUFFIXES, ".gguf"))
        or path.is_file()
        or (path / "saved_model.pb").is_file()
    )


def _data(
    text: list[str], loaded: dict[str, Any], reading: Any, preset: str, windows: Any
) -> tuple[Any, bool]:
    """Returns what is measured on, and whether it is records, which have windows of their own.

    Raises:
        ValueError: If nothing can tokenize records, or they are to be cut otherwise.
    """
    from tfgptopt.data.records import record_files
    from tfgptopt.evaluation import read_texts

    if not record_files(text):
        texts = read_texts(text)
        words = "" if len(texts.domains) == 1 else f" in {len(texts.domains)} domains"
        console.print(f"Text: {texts.size:,} bytes{words}, {windows.describe()}")
        return texts, False
    if windows.stride is not None:
        raise ValueError("Records have a window each: leave out --stride.")
    model = reading or next((m for m in loaded.values() if not isinstance(m, Path)), None)
    if model is None:
        raise ValueError("Give a preset with a tokenizer among the models, or with --tokenizer.")
    corpus = read_text(text, model, preset, windows.length, 4, validation_share=1.0)
    print_corpus(corpus)
    return corpus.validation, True


def _print(results: list[Result]) -> None:
    """Prints tables of what was measured."""
    from tfgptopt.job.tables import (
        batches_table,
        domains_table,
        latency_table,
        quality_table,
        results_table,
        tasks_table,
    )

    console.print(results_table(results))
    console.print(quality_table(results))
    console.print("Below a number: where 95 % of windows drawn anew would put it.")
    if len({result.quality.tokens for result in results}) > 1:
        console.print(
            "Models of several tokenizers: their perplexities do not compare, bits per byte do."
        )
    if results[0].quality.domains:
        console.print(domains_table(results))
    speeds = [result.speed for result in results]
    if any(s.by_depth or s.load_seconds is not None or s.joules_per_token for s in speeds):
        console.print(latency_table(results))
    if any(r.speed.by_batch for r in results):
        console.print(batches_table(results))
    if results[0].tasks:
        console.print(tasks_table(results))
