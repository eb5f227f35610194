"""The command line: `tfgptopt demo`, `optimize`, `export`, `generate`, `bench`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tfgptopt.backend import require_tensorflow
from tfgptopt.terminal.quiet import quiet_native_logs

app = typer.Typer(
    help="Make GPTs written in Keras small and fast while they train, and ship what was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(highlight=False)

Out = Annotated[Path, typer.Option(help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
StrategyName = Annotated[
    str, typer.Option(help="auto, default (one device), mirrored (several GPUs) or tpu.")
]

# Chosen so that two cores train it past a bigram model in three minutes.
_DEMO_SHAPE = {
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 192,
    "intermediate_dim": 768,
    "max_sequence_length": 64,
}


def _load_libraries() -> None:
    """Imports TensorFlow and KerasHub, which takes seconds and logs a page."""
    require_tensorflow()
    with console.status("Loading TensorFlow and KerasHub"), quiet_native_logs():
        import tfgptopt.job.optimizing  # noqa: F401


def _strategy(name: str) -> tuple[Any, str]:
    """Returns a strategy and its description, which is printed."""
    from tfgptopt.training import describe, strategy

    chosen = strategy(name)
    words = describe(chosen)
    console.print(f"Devices: {words}")
    return chosen, words


def _load_preset(preset: str) -> Any:
    """Loads a causal LM from a KerasHub preset, with a clear error for a broken folder."""
    import keras_hub

    folder = Path(preset)
    if folder.is_dir():
        weights = [*folder.glob("*.weights.h5"), *folder.glob("*.weights.json")]
        missing = "config.json" if not (folder / "config.json").is_file() else ""
        missing = missing or ("" if weights else "weights (*.weights.h5)")
        if missing:
            raise ValueError(f"The preset folder '{preset}' has no {missing}.")
    elif os.sep in preset and ":" not in preset:
        raise FileNotFoundError(f"There is no preset folder '{preset}'.")
    try:
        return keras_hub.models.CausalLM.from_preset(preset)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"KerasHub cannot load the preset '{preset}': {first}") from None


def _print_corpus(corpus: Any) -> None:
    console.print(
        f"Text: {len(corpus.training_files)} files, {corpus.training_bytes / 1e6:.1f} MB, "
        f"{corpus.training_tokens:,} tokens; held out: {len(corpus.validation_files)} files, "
        f"{corpus.validation_tokens:,} tokens"
    )
    if corpus.bad_bytes:
        console.print(f"{corpus.bad_bytes:,} bytes were no UTF-8 and became U+FFFD")


def _default_recipe(first: int, steps: int, sparsity: float, bits: int) -> Any:
    """Returns pruning over the first 60 percent of the steps, and rounding from the first on."""
    from tfgptopt.pruning import PolynomialDecay
    from tfgptopt.quantization import Int4, Int8
    from tfgptopt.recipe import Prune, QuantizeAware, Recipe

    end = first + max(1, steps * 6 // 10)
    frequency = max(1, (end - first) // 15)
    schedule = PolynomialDecay(0.0, sparsity, first, end, frequency=frequency)
    spec = Int8() if bits == 8 else Int4()
    techniques = [Prune(schedule)] if sparsity else []
    return Recipe((*techniques, QuantizeAware(spec)))


def _print_outcome(outcome: Any, out: Path) -> None:
    from tfgptopt.job.reporting import results_table, summary_lines

    console.print(results_table(outcome.results))
    for line in summary_lines(outcome):
        console.print(f"- {line}")
    console.print(f"\nReport: {out / 'report.html'}")
    console.print(f"Try it: tfgptopt generate {out / 'model.tflite'} 'import os'")


@app.command()
def demo(
    out: Out = Path("tfgptopt-demo"),
    bits: Annotated[int, typer.Option(help="8 or 4: bits of the weights.")] = 8,
    sparsity: Annotated[float, typer.Option(help="Share of weights to prune, in [0, 1).")] = 0.5,
    strategy: StrategyName = "auto",
    quick: Annotated[bool, typer.Option(help="A few steps only, to see that it runs.")] = False,
    force: Force = False,
) -> None:
    """Train, prune, quantize, export and measure a small GPT, in under five minutes.

    The text is the source of Python's standard library, which every machine has.
    """
    _load_libraries()
    from tfgptopt.data import load_corpus
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.optimizing import optimize, small_gpt
    from tfgptopt.training.planning import Training, compile_model

    check_target(out, force)
    _check_choice("bits", bits, (4, 8))
    chosen, words = _strategy(strategy)
    training = Training(4, 4, 1e-3) if quick else Training(900, 250, 1.2e-3)
    recipe = _default_recipe(training.shared_steps, training.steps, sparsity, bits)
    with console.status("Reading Python's standard library, training a tokenizer"):
        corpus = load_corpus(
            vocabulary_size=288, sequence_length=64, batch_size=16, validation_share=0.015
        )
    _print_corpus(corpus)
    import keras

    keras.utils.set_random_seed(0)
    with chosen.scope():
        model = small_gpt(corpus, **_DEMO_SHAPE)
        compile_model(model, training)
    console.print(f"Model: GPT-2 with {model.count_params() / 1e6:.1f} M weights")
    outcome = optimize(model, corpus, recipe, training, out, words, force, console)
    _print_outcome(outcome, out)


@app.command("optimize")
def optimize_command(
    text: Annotated[list[str], typer.Argument(help="Files, folders or globs of text.")],
    preset: Annotated[str, typer.Option(help="KerasHub preset: a folder or a name.")],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML of techniques: shrink, distill, prune, quantize_aware. "
            "Default: prune 50 %, round to int8."
        ),
    ] = None,
    out: Out = Path("tfgptopt-out"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak of warmup and cosine decay.")] = 3e-4,
    dense_run: Annotated[
        bool, typer.Option(help="Also fine-tune the dense model, for a fair comparison.")
    ] = False,
    strategy: StrategyName = "auto",
    force: Force = False,
) -> None:
    """Optimize your own model on your own text: fine-tune, prune, quantize, export, measure."""
    _load_libraries()
    from tfgptopt.data import load_corpus
    from tfgptopt.file.replacing import check_target
    from tfgptopt.job.optimizing import check_causal_lm, optimize
    from tfgptopt.recipe import Recipe
    from tfgptopt.training.planning import Training, compile_model

    check_target(out, force)
    training = Training(0, steps, learning_rate, dense_run)
    loaded = Recipe.load(recipe) if recipe else _default_recipe(0, steps, 0.5, 8)
    chosen, words = _strategy(strategy)
    with chosen.scope(), console.status(f"Loading {escape(preset)}"):
        model = _load_preset(preset)
        check_causal_lm(model)
        if model.preprocessor is None:
            raise ValueError(f"The preset '{preset}' has no tokenizer.")
        compile_model(model, training)
    with console.status("Reading text"):
        corpus = load_corpus(
            text,
            tokenizer=model.preprocessor.tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
        )
    _print_corpus(corpus)
    outcome = optimize(model, corpus, loaded, training, out, words, force, console)
    _print_outcome(outcome, out)


@app.command("export")
def export_command(
    preset: Annotated[str, typer.Argument(help="KerasHub preset: a folder or a name.")],
    path: Annotated[Path, typer.Argument(help="A name ending with .tflite, or a folder.")],
    recipe: Annotated[
        Path | None, typer.Option(help="recipe.yaml of the training. Default: as stored, float32.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Positions of the KV cache. Default: all of the model.")
    ] = None,
    force: Force = False,
) -> None:
    """Export a model as TFLite (with a KV cache) or as a SavedModel."""
    _load_libraries()
    from tfgptopt.exporting import TFLite, export
    from tfgptopt.file.replacing import check_target
    from tfgptopt.recipe import Recipe

    check_target(path, force)
    loaded = Recipe.load(recipe) if recipe else None
    with console.status(f"Loading {escape(preset)}"):
        model = _load_preset(preset)
    if loaded:
        loaded.replay(model)
    with console.status(f"Writing {path}"):
        export(model, path, TFLite(context_length) if context_length else None, force)
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")))
    console.print(f"{path}: {size / 1e6:.2f} MB")


@app.command()
def generate(
    file: Annotated[Path, typer.Argument(help="A .tflite file written by tfgptopt.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_length: Annotated[
        int | None, typer.Option(help="Tokens, prompt included. Default: the whole context.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="greedy, random, top_k, top_p or min_p. Default: greedy, or what follows."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Above 1 for more variety, below for less.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from tokens with so much probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens this share as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens of the text so far get less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text to stop at; may be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
) -> None:
    """Continue a text with an exported file. Needs neither TensorFlow nor Keras."""
    from tfgptopt.generation import MinP, Random, RepetitionPenalty, TFLiteCausalLM, TopK, TopP

    settings: list[tuple[Any, Any]] = [
        (Random, temperature),
        (TopK, top_k),
        (TopP, top_p),
        (MinP, min_p),
    ]
    chain: list[Any] = [make(value) for make, value in settings if value is not None]
    if sampler is not None or not chain:
        chain.append(sampler or "greedy")
    if repetition_penalty is not None:
        chain.insert(0, RepetitionPenalty(repetition_penalty))
    lm = TFLiteCausalLM(file, threads)
    pieces = lm.stream(prompt, max_length, chain, stop or "auto", seed)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help=".tflite files written by tfgptopt.")],
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
    _load_libraries()
    from tfgptopt.generation import TFLiteCausalLM

    models: dict[str, Any] = {str(file): TFLiteCausalLM(file) for file in files}
    shortest = min(lm.context_length for lm in models.values())
    prompt = list(range(min(16, shortest // 2)))
    new_tokens = min(new_tokens, shortest - len(prompt))
    if preset:
        with console.status(f"Loading {escape(preset)}"):
            models = {preset: _load_preset(preset), **models}
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


def _check_choice(name: str, value: int, choices: tuple[int, ...]) -> None:
    if value not in choices:
        wanted = " or ".join(map(str, choices))
        raise ValueError(f"--{name} must be {wanted}. Received: {value}")


def main() -> None:
    """Runs the command line; a user's mistake is one sentence and exit code 1."""
    # TensorFlow and LiteRT talk a lot; what a user must know is printed by us.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", module="keras")
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(f"Unexpected {type(error).__name__}: {error}")
    finally:
        # LiteRT logs while the process unloads it, when no code of ours runs any more.
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _fail(message: str) -> None:
    """Prints an error and ends with exit code 1."""
    errors = Console(stderr=True, highlight=False)
    errors.print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True)
    sys.exit(1)


def _show_warning(message: Any, category: Any, filename: str, *_: Any, **__: Any) -> None:
    """Shows warnings of this package as one line."""
    if "tfgptopt" in filename or "callbacks" in filename:
        Console(stderr=True, highlight=False).print(
            f"[yellow]Note:[/yellow] {escape(str(message))}"
        )


if __name__ == "__main__":
    main()
