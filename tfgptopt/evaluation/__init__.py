"""Measures models and exported files: size, speed, and quality on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import keras_hub

from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.evaluation.loss import keras_loss, perplexity, tflite_loss
from tfgptopt.evaluation.size import Size, keras_size, tflite_size
from tfgptopt.evaluation.speed import Speed, compare_speed
from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import Verbose, showing, stage

__all__ = ["Result", "Size", "Speed", "evaluate", "perplexity"]


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        name: What it is called in tables.
        size: Parameters, zeros, bytes.
        loss: Negative log-likelihood per held-out token, in nats.
        speed: Time to the first token and tokens per second.
    """

    name: str
    size: Size
    loss: float
    speed: Speed

    @property
    def perplexity(self) -> float:
        """Perplexity on the held-out text."""
        return perplexity(self.loss)


def evaluate(
    models: Mapping[str, keras.Model | str | Path],
    data: Data,
    prompt: Sequence[int] | None = None,
    new_tokens: int = 96,
    runs: int = 5,
    verbose: Verbose = "auto",
) -> list[Result]:
    """Measures Keras models and exported files side by side, each as itself.

    An exported file is scored through its own signatures, not through the model it came from.

    Args:
        models: Names to causal LMs of KerasHub, or to paths of exported files.
        data: Batches of `({"token_ids", "padding_mask"}, labels, sample_weight)`, such as
            `Corpus.validation`.
        prompt: Token ids to generate from. Defaults to `None`: the first 16 of `data`.
        new_tokens: int. Tokens to generate for the speed. Defaults to `96`.
        runs: int. Generations whose median counts. Defaults to `5`.
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.

    Returns:
        List of `Result`, in the order of `models`.

    Raises:
        ValueError: If there is no model, or one is neither a causal LM nor a path.

    Example:

    ```python
    results = tfgptopt.evaluate({"Keras": gpt, "TFLite": "gpt.tflite"}, corpus.validation)
    print([(r.name, r.perplexity, r.speed.tokens_per_second) for r in results])
    ```
    """
    if not models:
        raise ValueError("`models` is empty. Give names and models to measure.")
    for name, model in models.items():
        if not isinstance(model, keras_hub.models.CausalLM | str | Path):
            raise ValueError(
                f"'{name}' is neither a keras_hub.models.CausalLM nor a path of an exported file. "
                f"Received: {model!r} (of type {type(model)})"
            )
    if prompt is None:
        inputs, _, _ = next(data.as_numpy_iterator())
        prompt = inputs["token_ids"][0, :16].tolist()
    loaded: dict[str, keras_hub.models.CausalLM | TFLiteCausalLM] = {
        name: TFLiteCausalLM(m) if isinstance(m, str | Path) else m for name, m in models.items()
    }
    with showing(verbose):
        with stage("Measuring speed, in turns"):
            speeds = compare_speed(loaded, list(prompt), new_tokens, runs)
        return _measure(loaded, data, speeds)


def _measure(
    loaded: Mapping[str, keras_hub.models.CausalLM | TFLiteCausalLM],
    data: Data,
    speeds: Mapping[str, Speed],
) -> list[Result]:
    """Returns sizes and losses beside the speeds."""
    results = []
    for name, model in loaded.items():
        if isinstance(model, TFLiteCausalLM):
            size, loss = tflite_size(model.path), tflite_loss(model, data)
        else:
            with tokens_as_input(model):
                size, loss = keras_size(model), keras_loss(model, data)
        results.append(Result(name, size, loss, speeds[name]))
    return results
