"""What `tune` tries on a model, and how one candidate becomes a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import keras_hub
from rich.console import Console

from tfgptopt.callbacks import from_recipe
from tfgptopt.data.corpus import Corpus
from tfgptopt.distillation import Distiller
from tfgptopt.distillation.technique import Distill
from tfgptopt.exporting import TFLite, export
from tfgptopt.job.search import Candidate
from tfgptopt.job.stages import train
from tfgptopt.model.cloning import clone
from tfgptopt.pruning import PolynomialDecay, SparseGPT
from tfgptopt.pruning.one_shot import prune
from tfgptopt.quantization.post_training import Method, quantize
from tfgptopt.quantization.specs import parse_spec
from tfgptopt.recipe import Prune, QuantizeAware, Recipe, Technique
from tfgptopt.shrinking.shrinker import shrink
from tfgptopt.shrinking.technique import Shrink
from tfgptopt.training.planning import Training, compile_model

_CALIBRATION_BATCHES = 8


def default_candidates() -> list[Candidate]:
    """Returns what is tried, from cheap to dear."""
    methods = (
        (0, "int8", "rtn"),
        (0, "int4:32", "mse"),
        (0, "int4", "mse"),
        (1, "int8", "smoothquant"),
        (1, "int8", "gptq"),
        (1, "int4:32", "gptq"),
        (1, "int4", "gptq"),
    )
    found = [Candidate(f"{spec} {method}", tier, spec, method) for tier, spec, method in methods]
    found.append(Candidate("50 % pruned, int8", 1, "int8", "rtn", sparsity=0.5))
    found += [Candidate(f"trained {spec}", 2, spec) for spec in ("int8", "int4:32", "int4")]
    found.append(Candidate("trained 50 % pruned, int8", 2, "int8", sparsity=0.5))
    for depth, feedforward in ((1.0, 0.75), (1.0, 0.5), (0.7, 1.0), (0.7, 0.5)):
        words = " ".join(
            f"{share:.0%} {name}".replace("%", " %")
            for share, name in ((depth, "of layers"), (feedforward, "of neurons"))
            if share < 1
        )
        for spec in ("int8", "int4:32", "int4"):
            found.append(
                Candidate(f"{words}, {spec}, distilled", 3, spec, "auto", 0.0, depth, feedforward)
            )
    return found


def training_recipe(candidate: Candidate, steps: int) -> Recipe:
    """Returns what a candidate does, as a recipe."""
    techniques: list[Technique] = []
    if candidate.depth < 1 or candidate.feedforward < 1:
        techniques += [_shape(candidate), Distill(steps)]
    if candidate.sparsity and candidate.trains:
        schedule = PolynomialDecay(
            0.0, candidate.sparsity, 0, max(1, steps * 6 // 10), frequency=max(1, steps // 25)
        )
        techniques.append(Prune(schedule))
    techniques.append(QuantizeAware(parse_spec(candidate.spec)))
    return Recipe(tuple(techniques))


def _shape(candidate: Candidate) -> Shrink:
    return Shrink(
        depth=candidate.depth if candidate.depth < 1 else None,
        feedforward=candidate.feedforward if candidate.feedforward < 1 else None,
    )


def carry_out(
    candidate: Candidate,
    model: keras_hub.models.CausalLM,
    corpus: Corpus,
    steps: int,
    path: Path,
    learning_rate: float,
    console: Console,
) -> Any:
    """Makes the file of a candidate. The model is left as it is.

    Args:
        candidate: What to do.
        model: The float model.
        corpus: Text to calibrate and to train on.
        steps: Steps of training, if it trains.
        path: The file to write.
        learning_rate: Peak of the schedule.
        console: Where to show progress.

    Returns:
        The model that was exported.
    """
    calibration = corpus.train.take(_CALIBRATION_BATCHES)
    if candidate.depth < 1 or candidate.feedforward < 1:
        student = shrink(model, calibration=calibration, **_shape(candidate).settings())
    else:
        student = clone(model)
    if candidate.trains:
        recipe = training_recipe(candidate, steps)
        taught = candidate.tier == 3
        trainer = Distiller(student, model) if taught else student
        compile_model(trainer, Training(0, steps, learning_rate))
        callbacks = from_recipe(recipe.in_fit, calibration)
        train(trainer, corpus.train, steps, candidate.name, console, callbacks)
    else:
        if candidate.sparsity:
            prune(student, candidate.sparsity, score=SparseGPT(calibration))
        methods = cast("Sequence[Method]", candidate.method.split("+"))
        data = calibration if candidate.tier else None
        quantize(student, parse_spec(candidate.spec), methods, data)
    export(student, path, TFLite(), overwrite=True)
    return student
