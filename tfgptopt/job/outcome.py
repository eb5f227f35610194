"""What a job made, and its numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tfgptopt.data.corpus import Corpus
from tfgptopt.evaluation import Result
from tfgptopt.recipe import Recipe

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
        sample: Continuation of a prompt by the exported file.
    """

    results: list[Result]
    curves: dict[str, Curve]
    sparsity: dict[str, float]
    bigram_loss: float
    recipe: Recipe
    strategy: str
    corpus: Corpus
    sample: str


def write_results(outcome: Outcome, path: Path) -> None:
    """Writes the numbers of a job as JSON."""
    rows = [
        {
            "name": result.name,
            "parameters": result.size.parameters,
            "nonzero_share": result.size.nonzero_share,
            "file_bytes": result.size.file_bytes,
            "gzip_bytes": result.size.gzip_bytes,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "first_token_ms": result.speed.first_token_ms,
            "tokens_per_second": result.speed.tokens_per_second,
        }
        for result in outcome.results
    ]
    data = {
        "results": rows,
        "bigram_loss": outcome.bigram_loss,
        "sparsity": outcome.sparsity,
        "recipe": outcome.recipe.to_config(),
        "strategy": outcome.strategy,
        "curves": outcome.curves,
    }
    path.write_text(json.dumps(data, indent=1), "utf-8")
