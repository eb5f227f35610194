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
    from tfgptopt.quantization.specs import Spec
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


def load_preset(preset: str, dtype: str | None = None) -> keras.Model:
    """Loads a causal LM, with a clear error for a broken folder.

    Args:
        preset: Folder or name of a KerasHub preset, an `hf://` handle, or a local Hugging Face
            folder with safetensors.
        dtype: Policy of its layers. Defaults to `None`: as stored.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder lacks a file, or KerasHub cannot load it.
    """
    import keras_hub

    from tfgptopt.data import load_template, set_template

    folder = Path(preset)
    if folder.is_dir():
        kinds = ("*.weights.h5", "*.weights.json", "*.safetensors")
        weights = [path for kind in kinds for path in folder.glob(kind)]
        missing = "config.json" if not (folder / "config.json").is_file() else ""
        missing = missing or ("" if weights else "weights (*.weights.h5, *.safetensors)")
        if missing:
            raise ValueError(f"The preset folder '{preset}' has no {missing}.")
    elif os.sep in preset and ":" not in preset:
        raise FileNotFoundError(f"There is no preset folder '{preset}'.")
    try:
        options = {"dtype": dtype} if dtype else {}
        model = keras_hub.models.CausalLM.from_preset(preset, **options)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"KerasHub cannot load the preset '{preset}': {first}") from None
    template = load_template(folder) if folder.is_dir() else None
    if template is not None:
        set_template(model, template)
    return model


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
