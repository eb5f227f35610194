import json

import keras
import numpy as np
import pytest

from tfgptopt.training import (
    InverseSquareRoot,
    StableDecay,
    Warmup,
    learning_rate_schedule,
    set_rates,
)
from tfgptopt.training.rates import SCHEDULES

PEAK, STEPS, WARMUP = 0.4, 110, 10
# What each is from the end of the warmup on, at a share of the rest.
FORMULAS = {
    "cosine": lambda done: PEAK * (0.03 + 0.97 * (1 + np.cos(np.pi * done)) / 2),
    "linear": lambda done: PEAK * (1 - 0.97 * done),
    "polynomial": lambda done: PEAK * (0.03 + 0.97 * (1 - done) ** 2),
    "exponential": lambda done: PEAK * 0.03**done,
    "inverse_sqrt": lambda done: PEAK * np.sqrt(WARMUP / (WARMUP + 100 * done)),
    "wsd": lambda done: PEAK * (1 - 0.97 * np.maximum(0, (done - 0.8) / 0.2)),
    "constant": lambda done: PEAK + 0 * done,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_their_formulas_and_can_be_serialized(name):
    schedule = learning_rate_schedule(name, PEAK, STEPS, WARMUP)
    written = json.loads(json.dumps(keras.saving.serialize_keras_object(schedule)))
    again = keras.saving.deserialize_keras_object(written)
    steps = np.arange(STEPS + 1)
    expected = np.where(
        steps < WARMUP, PEAK * steps / WARMUP, FORMULAS[name]((steps - WARMUP).clip(0) / 100)
    )
    for one in (schedule, again):
        found = [float(one(keras.ops.cast(step, "int64"))) for step in steps]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bad_schedules():
    with pytest.raises(ValueError, match="one of cosine, linear"):
        learning_rate_schedule("cosinus", 0.1, 10)
    for make in (
        lambda: Warmup(0.0, 5),
        lambda: Warmup(0.1, -1),
        lambda: InverseSquareRoot(float("inf"), 1),
        lambda: StableDecay(0.1, 2.5, 1),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()


def small(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="body"), keras.layers.Dense(2, name="head")]
    )
    model.compile(optimizer, "mse")
    return model


def step(model):
    """Returns by how much one step moves each weight."""
    before = model.get_weights()
    x = np.random.default_rng(0).normal(size=(8, 4))
    model.fit(x, x[:, :2], batch_size=8, verbose=0)
    return [new - old for new, old in zip(model.get_weights(), before, strict=True)]


def test_groups_have_rates_of_their_own():
    def optimizer():
        return keras.optimizers.AdamW(0.01, weight_decay=0.5)

    plain = step(small(optimizer()))
    model = small(optimizer())
    step(model)  # Traced, with other rates.
    model.set_weights(small(optimizer()).get_weights())
    model.compile(optimizer(), "mse")
    set_rates(model, {"head/kernel": 0.25, "head": 0.0, "bias": 2.0})
    moved = step(model)
    for ours, theirs, factor in zip(moved, plain, (1.0, 2.0, 0.25, 0.0), strict=True):
        np.testing.assert_allclose(ours, factor * theirs, atol=1e-7)
    assert model.optimizer.weight_decay == 0.5
    model.set_weights(small(optimizer()).get_weights())
    model.optimizer.set_weights([np.zeros(v.shape, v.dtype) for v in model.optimizer.variables])
    model.optimizer.learning_rate = 0.01
    set_rates(model, {})
    for ours, theirs in zip(step(model), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_bad_rates_change_nothing():
    model = small("sgd")
    with pytest.raises(ValueError, match="No trainable weight matches 'typo'"):
        set_rates(model, {"head": 0.1, "typo": 1.0})
    with pytest.raises(ValueError, match="A factor must be a number >= 0"):
        set_rates(model, {"head": -1.0})
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="not compiled"):
        set_rates(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), {})
