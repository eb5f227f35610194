"""Measures models and exported files: size, speed, and quality on held-out text."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import keras_hub

from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.data.encoding import tokenizer_of
from tfgptopt.evaluation.loss import perplexity
from tfgptopt.evaluation.quality import Quality, compare_quality
from tfgptopt.evaluation.size import Size, keras_size, tflite_size
from tfgptopt.evaluation.speed import Speed, compare_speed
from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import Verbose, showing, stage

__all__ = ["Quality", "Result", "Size", "Speed", "evaluate", "perplexity"]


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        name: What it is called in tables.
        size: Parameters, zeros, bytes.
        quality: What it makes of the held-out text.
        speed: Time to the first token and tokens per second.
    """

    name: str
    size: Size
    quality: Quality
    speed: Speed

    @property
    def loss(self) -> float:
        """Negative log-likelihood per held-out token, in nats."""
        return self.quality.loss

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
    reference: str | None = None,
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
        reference: Name of the model that the others are compared with (KL, equal likeliest tokens,
            change of perplexity). Defaults to `None`: the first one, if there are several.

    Returns:
        List of `Result`, in the order of `models`.

    Raises:
        ValueError: If there is no model, one is neither a causal LM nor a path, the reference is
            not among them, or the data are empty.

    Example:

    ```python
    results = tfgptopt.evaluate({"Keras": gpt, "TFLite": "gpt.tflite"}, corpus.validation)
    print([(r.name, r.perplexity, r.speed.tokens_per_second) for r in results])
    print(results[1].quality.kl, results[1].quality.intervals["change"])
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
    if reference is not None and reference not in models:
        raise ValueError(f"`reference` must be one of {list(models)}. Received: {reference!r}")
    if reference is None and len(models) > 1:
        reference = next(iter(models))
    if prompt is None:
        inputs, _, _ = next(data.as_numpy_iterator())
        prompt = inputs["token_ids"][0, :16].tolist()
    loaded: dict[str, keras_hub.models.CausalLM | TFLiteCausalLM] = {
        name: TFLiteCausalLM(m) if isinstance(m, str | Path) else m for name, m in models.items()
    }
    detokenize = _detokenizer(loaded)  # While models still have their preprocessors.
    with showing(verbose):
        with stage("Measuring speed, in turns"):
            speeds = compare_speed(loaded, list(prompt), new_tokens, runs)
        with contextlib.ExitStack() as stack:
            for model in loaded.values():
                if isinstance(model, keras_hub.models.CausalLM):
                    stack.enter_context(tokens_as_input(model))
            found = compare_quality(loaded, data, reference, detokenize)
    return [
        Result(name, _size_of(model), found[name], speeds[name]) for name, model in loaded.items()
    ]


def _size_of(model: keras_hub.models.CausalLM | TFLiteCausalLM) -> Size:
    return tflite_size(model.path) if isinstance(model, TFLiteCausalLM) else keras_size(model)


def _detokenizer(
    models: Mapping[str, keras_hub.models.CausalLM | TFLiteCausalLM],
) -> Callable[[list[int]], str] | None:
    """Returns what makes text of ids, from the first model that can."""
    for model in models.values():
        if isinstance(model, TFLiteCausalLM):
            if model.metadata.tokenizer or model.metadata.sentencepiece:
                return model.detokenize
        elif (tokenizer := tokenizer_of(model)) is not None:
            return functools.partial(_text_of, tokenizer)
    return None


def _text_of(tokenizer: keras_hub.tokenizers.Tokenizer, ids: list[int]) -> str:
    text = tokenizer.detokenize(ids)
    return text if isinstance(text, str) else bytes(text.numpy()).decode(errors="replace")
