"""Keras callbacks that make a GPT smaller while `fit` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from tfgptopt.callbacks.checkpoint import Checkpoint
from tfgptopt.callbacks.monitoring import PerformanceMonitor
from tfgptopt.callbacks.progress import TrainingProgress
from tfgptopt.callbacks.pruning import Pruning
from tfgptopt.callbacks.quantization import QuantizationAwareTraining
from tfgptopt.callbacks.regularization import Regularization

from tfgptopt.model.types import Data
from tfgptopt.pruning.regularizing import Regularize
from tfgptopt.pruning.technique import Prune
from tfgptopt.quantization.technique import QuantizeAware
from tfgptopt.recipe import Recipe

__all__ = [
    "Checkpoint",
    "PerformanceMonitor",
    "Pruning",
    "QuantizationAwareTraining",
    "Regularization",
    "TrainingProgress",
    "from_recipe",
    "register_callback",
]

# Makes the callback that carries out a technique, with the calibration data of the job.
Maker = Callable[[Any, Any], keras.callbacks.Callback]

_MAKERS: dict[type[Any], Maker] = {
    Prune: Pruning.of,
    Regularize: Regularization.of,
    QuantizeAware: QuantizationAwareTraining.of,
}


def register_callback(technique_class: type[Any], make: Maker) -> None:
    """Lets `from_recipe` carry out a technique of your own.

    Args:
        technique_class: A technique; see `tfgptopt.recipe.register_technique`.
        make: Called with a technique and calibration data (or `None`), returns the callback.
    """
    _MAKERS[technique_class] = make


def from_recipe(recipe: Recipe, calibration: Data = None) -> list[keras.callbacks.Callback]:
    """Returns the callbacks that carry out a recipe in `fit`.

    Args:
        recipe: A `tfgptopt.Recipe`.
        calibration: Data for scores that need some, which a recipe does not keep. Defaults to
            `None`.

    Returns:
        List of callbacks, in the order of the recipe.

    Raises:
        ValueError: If the recipe shrinks, rotates or distills, which is not done by callbacks, or
            holds a technique that no callback was registered for.
    """
    if recipe.in_fit != recipe:
        raise ValueError(
            "Shrinking, rotation and distillation are no callbacks. Use `tfgptopt optimize` for "
            "the whole recipe, or `tfgptopt.shrink`, `rotate` and `tfgptopt.Distiller` with "
            "`from_recipe(recipe.in_fit)`."
        )
    for technique in recipe.techniques:
        if type(technique) not in _MAKERS:
            raise ValueError(
                f"No callback carries out {technique!r}. Call "
                "`tfgptopt.callbacks.register_callback` first."
            )
    return [_MAKERS[type(technique)](technique, calibration) for technique in recipe.techniques]
