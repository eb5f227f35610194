"""What commands share: options, the console, and loading what they work on.

TensorFlow and KerasHub take seconds to import, so that only functions that need them do it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tfgptopt.backend import require_tensorflow
from tfgptopt.terminal.quiet import quiet_native_logs

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from tfgptopt.data import Corpus
    from tfgptopt.recipe import Recipe

console = Console(highlight=False)

Out = Annotated[Path, typer.Option(help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
StrategyName = Annotated[
    str, typer.Option(help="auto, default (one device), mirrored (several GPUs) or tpu.")
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


def load_preset(preset: str) -> keras.Model:
    """Loads a causal LM from a KerasHub preset, with a clear error for a broken folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder lacks a file, or KerasHub cannot load it.
    """
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


def default_recipe(first: int, steps: int, sparsity: float, bits: int) -> Recipe:
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


def print_corpus(corpus: Corpus) -> None:
    """Prints what text there is, and what was cut off."""
    console.print(corpus.describe())
