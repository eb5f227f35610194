"""Keras callbacks that make a GPT smaller while `fit` runs."""

from __future__ import annotations

from typing import Any

import keras
from tfgptopt.callbacks.progress import TrainingProgress
from tfgptopt.callbacks.pruning import Pruning
from tfgptopt.callbacks.quantization import QuantizationAwareTraining

from tfgptopt.pruning.scores import Wanda
from tfgptopt.recipe import QuantizeAware, Recipe

__all__ = ["Pruning", "QuantizationAwareTraining", "TrainingProgress", "from_recipe"]


def from_recipe(recipe: Recipe, calibration: Any = None) -> list[keras.callbacks.Callback]:
    """Returns the callbacks that carry out a recipe in `fit`.

    Args:
        recipe: A `tfgptopt.Recipe`.
        calibration: Data for scores that need some, which a recipe does not keep. Defaults to
            `None`.

    Returns:
        List of callbacks, in the order of the recipe.

    Raises:
        ValueError: If the recipe shrinks or distills, which is not done by callbacks.
    """
    if recipe.in_fit != recipe:
        raise ValueError(
            "Shrinking and distillation are no callbacks. Use `tfgptopt optimize` for the whole "
            "recipe, or `tfgptopt.shrink` and `tfgptopt.Distiller` with "
            "`from_recipe(recipe.in_fit)`."
        )
    return [_callback(technique, calibration) for technique in recipe.techniques]


def _callback(technique: Any, calibration: Any) -> keras.callbacks.Callback:
    if isinstance(technique, QuantizeAware):
        return QuantizationAwareTraining(
            technique.spec, technique.targets, technique.start_step, technique.freeze_step
        )
    score = technique.score
    if isinstance(score, Wanda) and score.data is None:
        score = Wanda(calibration)
    return Pruning(
        technique.schedule, technique.pattern, score, technique.targets, technique.allocation
    )
