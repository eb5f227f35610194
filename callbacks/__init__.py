"""Keras callbacks that make a GPT smaller while `fit` runs."""

from __future__ import annotations

import keras
from tfgptopt.callbacks.progress import TrainingProgress
from tfgptopt.callbacks.pruning import Pruning
from tfgptopt.callbacks.quantization import QuantizationAwareTraining

from tfgptopt.recipe import Prune, Recipe

__all__ = ["Pruning", "QuantizationAwareTraining", "TrainingProgress", "from_recipe"]


def from_recipe(recipe: Recipe) -> list[keras.callbacks.Callback]:
    """Returns the callbacks that carry out a recipe in `fit`.

    Args:
        recipe: A `tfgptopt.Recipe`.

    Returns:
        List of callbacks, in the order of the recipe.
    """
    return [
        Pruning(technique.schedule, targets=technique.targets)
        if isinstance(technique, Prune)
        else QuantizationAwareTraining(technique.spec, technique.targets, technique.start_step)
        for technique in recipe.techniques
    ]
