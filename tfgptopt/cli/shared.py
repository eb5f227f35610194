"""What commands share: options, the console, and loading what they work on.

TensorFlow and KerasHub take seconds to import, so that only functions that need them do it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tfgptopt.backend import require_tensorflow
from tfgptopt.terminal.quiet import quiet_native_logs

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from tfgptopt.data import Corpus
    from tfgptopt.quantization.specs import Spec
    from tfgptopt.recipe import Recipe

console = Console(highlight=False)

# Of files that generate, evaluate and the like read.
FILE_SUFFIXES = (".tflite", ".litertlm")

Out = Annotated[Path, typer.Option(help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the same command was stopped.")]
StrategyName = Annotated[
    str,
    typer.Option(
        help="auto, default (one device), mirrored (several GPUs), workers (of TF_CONFIG) or tpu."
    ),
]


def load_libraries() -> None:
    """Imports TensorFlow and KerasHub, which takes seconds and logs a page."""
    require_tensorflow()
    with console.status("Loading TensorFlow and KerasHub"), quiet_native_logs():
        import tfgptopt.job.optimizing  # noqa: F401


def choose_strategy(name: str) -> tuple[tf.distribute.Strategy, str]:
    """Returns a strategy and its description, which is printed."""
    from tfgptopt.training import describe, strategy

    chosen = strategy(name)
    words = describe(chosen)
    console.print(f"Devices: {words}")
    return chosen, words


def load(preset: str, dtype: str | None = None) -> keras.Model:
    """Loads a causal LM, and says so meanwhile."""
    from tfgptopt.data import load_preset

    with console.status(f"Loading {escape(preset)}"):
        return load_preset(preset, dtype)


def read_text(
    sources: list[str],
    model: keras.Model,
    preset: str,
    sequence_length: int,
    batch_size: int,
    validation_share: float = 0.05,
) -> Corpus:
    """Reads text or records with the tokenizer and the chat template of a model.

    Raises:
        ValueError: If the model has no tokenizer, or the text cannot be used.
    """
    from tfgptopt.data import load_corpus, template_of
    from tfgptopt.data.presets import reading_tokenizer

    tokenizer = reading_tokenizer(model, preset)
    with console.status("Reading text"):
        return load_corpus(
            sources,
            tokenizer=tokenizer,
            chat_template=template_of(model),
            sequence_length=sequence_length,
            batch_size=batch_size,
            validation_share=validation_share,
        )


def perplexity_of(model: keras.Model | Path, held_out: tf.data.Dataset) -> float:
    """Returns the perplexity of a model, or of an exported file, on held-out windows."""
    from tfgptopt.data import tokens_as_input
    from tfgptopt.evaluation.loss import keras_loss, perplexity, tflite_loss
    from tfgptopt.generation import TFLiteCausalLM
    from tfgptopt.terminal.progress import showing

    with showing("auto", console):
        if isinstance(model, Path):
            return perplexity(tflite_loss(TFLiteCausalLM(model), held_out))
        with tokens_as_input(model):
            return perplexity(keras_loss(model, held_out))


def default_recipe(first: int, steps: int, sparsity: float, spec: Spec) -> Recipe:
    """Returns rounding from the first step on, behind pruning over the first 60 percent of the
    steps if a sparsity is asked for."""
    from tfgptopt.pruning import PolynomialDecay
    from tfgptopt.recipe import Prune, QuantizeAware, Recipe

    end = first + max(1, steps * 6 // 10)
    frequency = max(1, (end - first) // 15)
    schedule = PolynomialDecay(0.0, sparsity, first, end, frequency=frequency)
    techniques = [Prune(schedule)] if sparsity else []
    return Recipe((*techniques, QuantizeAware(spec)))


def print_size(path: Path) -> None:
    """Prints how large an exported file or folder is."""
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")))
    console.print(f"{path}: {size / 1e6:.2f} MB")


def print_corpus(corpus: Corpus) -> None:
    """Prints what text there is, and what was cut off."""
    console.print(corpus.describe())


def template_or_file(choice: str | None) -> str | None:
    """Returns a chat template as it was given: a name, or the Jinja in a file."""
    if choice is not None and Path(choice).is_file():
        return Path(choice).read_text("utf-8")
    return choice
