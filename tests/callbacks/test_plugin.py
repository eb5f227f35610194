"""A technique of a user, and the callback that carries it out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch
from tfgptopt.callbacks import from_recipe, register_callback

from tfgptopt.model.targets import select
from tfgptopt.recipe import Recipe, Technique, register_technique


@dataclass(frozen=True)
class Clip:
    """Keeps weights within a limit, so that few of them set the scale of all."""

    limit: float

    name: ClassVar[str] = "clip"
    order: ClassVar[int] = 2

    def to_config(self):
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def replay(self, model):
        pass

    @classmethod
    def found_on(cls, model):
        return []


class Clipping(keras.callbacks.Callback):
    def __init__(self, technique, calibration=None):
        super().__init__()
        self.limit = technique.limit

    def on_train_batch_end(self, batch, logs=None):
        for target in select(self.model):
            target.variable.assign(keras.ops.clip(target.variable, -self.limit, self.limit))


def test_a_technique_from_outside_is_carried_out_from_yaml(tmp_path):
    assert isinstance(Clip(0.1), Technique)
    with pytest.raises(ValueError, match="No callback carries out Clip"):
        from_recipe(Recipe((Clip(0.1),)))
    register_technique(Clip)
    register_callback(Clip, Clipping)
    Recipe((Clip(0.01),)).save(tmp_path / "recipe.yaml")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe == Recipe((Clip(0.01),))
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    model.fit(*random_batch(), verbose=0, callbacks=from_recipe(recipe))
    for target in select(model):
        assert np.abs(target.variable.numpy()).max() <= np.float32(0.01)
