"""Recipes: the ordered techniques that were or will be applied to a model, as data."""

from tfgptopt.recipe.recipe import Prune, QuantizeAware, Recipe, recipe_of
from tfgptopt.recipe.stages import Distill, Shrink

__all__ = ["Distill", "Prune", "QuantizeAware", "Recipe", "Shrink", "recipe_of"]
