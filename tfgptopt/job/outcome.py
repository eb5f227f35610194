"""What a job made, and its numbers as a file of results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import keras

import tfgptopt
from tfgptopt.data.corpus import Corpus
from tfgptopt.data.encoding import tokenizer_of
from tfgptopt.data.portable import text_tokenizer
from tfgptopt.evaluation import Result
from tfgptopt.evaluation.distributions import Distribution
from tfgptopt.evaluation.machine import Machine
from tfgptopt.evaluation.results import Run, Training, save_results
from tfgptopt.quantization import report
from tfgptopt.recipe import Recipe

# Of held-out text, for the report: how many prompts, and how many tokens of each.
_PROMPTS, _PROMPT = 3, 12
Curve = list[tuple[int, float, float]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a job made.

    Attributes:
        results: Measurements, dense and optimized, Keras and TFLite; between them the stages.
        curves: Names of runs to lists of `(step, loss, sparsity)`.
        sparsity: Path of each pruned weight to its share of zeros.
        bigram_loss: Held-out loss of a bigram model, in nats per token.
        recipe: What was applied.
        strategy: The strategy that was used, in words.
        corpus: The text.
        noise: Path of each rounded weight to its ratio of signal to noise, in dB.
        weights: Places in layers to how the weights there lay before and after.
        machine: Where it was measured, or `None`.
    """

    results: list[Result]
    curves: dict[str, Curve]
    sparsity: dict[str, float]
    bigram_loss: float
    recipe: Recipe
    strategy: str
    corpus: Corpus
    noise: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Distribution] = field(default_factory=dict)
    machine: Machine | None = None

    def as_run(self) -> Run:
        """Returns the numbers as a file of results has them."""
        corpus = self.corpus
        about = {
            "training text": corpus.training_words,
            "held-out text": corpus.validation_words,
            "bytes that were no UTF-8": f"{corpus.bad_bytes:,}",
            "devices": self.strategy,
            "tfgptopt": tfgptopt.__version__,
        }
        training = Training(
            curves={name: tuple(curve) for name, curve in self.curves.items()},
            sparsity=self.sparsity,
            noise=self.noise,
            weights=self.weights,
            recipe=self.recipe.to_config(),
            bigram_loss=self.bigram_loss,
        )
        reference = self.results[0].name
        return Run(tuple(self.results), reference, about, self.machine, training)


def write_results(outcome: Outcome, path: Path) -> None:
    """Writes the numbers of a job as JSON."""
    save_results(outcome.as_run(), path)


def rounding_noise(model: keras.Model) -> dict[str, float]:
    """Returns the ratio of signal to noise, in dB, of each weight that is rounded and does not lie
    on its grid already."""
    try:
        rows = report(model).rows
    except ValueError:  # Nothing is rounded.
        return {}
    return {row.path: row.weight_sqnr for row in rows if math.isfinite(row.weight_sqnr)}


def first_words(corpus: Corpus, model: keras.Model) -> list[str]:
    """Returns the first words of a few held-out windows, for all to continue."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        return []
    inputs, _, _ = next(corpus.validation.as_numpy_iterator())
    decode = text_tokenizer(tokenizer).decode
    texts = [decode(row[:_PROMPT].tolist()) for row in inputs["token_ids"][:_PROMPTS]]
    return [text for text in dict.fromkeys(texts) if text.strip()]
