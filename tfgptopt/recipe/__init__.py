"""Recipes: the ordered techniques that were or will be applied to a model, as data."""

from tfgptopt.distillation.technique import Distill
from tfgptopt.recipe.recipe import Prune, QuantizeAware, Recipe, recipe_of
from tfgptopt.shrinking.technique import Shrink

__all__ = ["Distill", "Prune", "QuantizeAware", "Recipe", "Shrink", "recipe_of"]
