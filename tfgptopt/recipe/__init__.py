"""Recipes: the ordered techniques that were or will be applied to a model, as data."""

from tfgptopt.distillation.technique import Distill
from tfgptopt.model.techniques import Technique, register_technique
from tfgptopt.pruning.regularizing import Regularize
from tfgptopt.pruning.technique import Prune
from tfgptopt.quantization.rotation import Rotate
from tfgptopt.quantization.technique import QuantizeAware
from tfgptopt.recipe import recipes
from tfgptopt.recipe.recipe import Recipe, recipe_of
from tfgptopt.shrinking.technique import Shrink

__all__ = [
    "Distill",
    "Prune",
    "QuantizeAware",
    "Recipe",
    "Regularize",
    "Rotate",
    "Shrink",
    "Technique",
    "recipe_of",
    "recipes",
    "register_technique",
]
