"""A pattern of a user: one class, one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch
from tfgptopt.callbacks import from_recipe

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity, Pattern, Prune, SparseGPT, register_pattern, report
from tfgptopt.recipe import Recipe, recipe_of


@dataclass(frozen=True)
class Diagonals:
    """Every other diagonal goes: the cells of a chessboard of one color."""

    color: int = 0

    sparsity: ClassVar[float] = 0.5
    takes_allocation: ClassVar[bool] = False
    inputs_together: ClassVar[None] = None

    def _kept(self, rows: int, columns: int) -> np.ndarray:
        return np.add.outer(np.arange(rows), np.arange(columns)) % 2 == self.color

    def masks(self, scores, sparsity):
        return [tf.constant(self._kept(*x.shape)) for x in scores]

    def check(self, shape, path):
        pass

    def holds(self, kept):
        return not kept[~self._kept(*kept.shape)].any()

    def supports(self, score):
        return score == "magnitude"

    def keep(self, scores, sparsity):
        return self._kept(*scores.shape)


def test_a_pattern_from_outside_prunes_in_fit_and_comes_back_from_yaml(tmp_path):
    register_pattern("diagonals", Diagonals)
    assert isinstance(Diagonals(), Pattern)
    Recipe((Prune(ConstantSparsity(0.5, 0), Diagonals(1)),)).save(tmp_path / "recipe.yaml")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.techniques[0].pattern == Diagonals(1)
    model = make_gpt()
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    model.fit(*random_batch(), verbose=0, callbacks=from_recipe(recipe))
    assert report(model).holds and report(model).sparsity == pytest.approx(0.5, abs=0.01)
    for target in select(model):
        kept = np.asarray(target.to_matrix(target.variable.value)) != 0
        np.testing.assert_array_equal(kept, Diagonals(1)._kept(*kept.shape))
    assert recipe_of(model).techniques[0].pattern == Diagonals(1)


def test_what_it_does_not_support_is_refused():
    model = make_gpt()
    with pytest.raises(ValueError, match="cannot prune with Diagonals"):
        tfgptopt.prune(model, pattern=Diagonals(), score=SparseGPT([random_batch()[0]]))
    with pytest.raises(ValueError, match=r"complete at sparsity 0\.5"):
        tfgptopt.prune(model, 0.9, Diagonals())
    with pytest.raises(ValueError, match="must be Unstructured"):
        tfgptopt.prune(model, 0.5, Diagonals)
    with pytest.raises(ValueError, match="a pattern 'rows' already"):
        register_pattern("rows", Diagonals)

    class Unnamed(Diagonals):
        pass

    with pytest.raises(ValueError, match=r"register_pattern\('name', Unnamed\)"):
        Prune(ConstantSparsity(0.5, 0), Unnamed()).to_config()
