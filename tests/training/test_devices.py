import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

from tfgptopt.model.targets import select
from tfgptopt.pruning import PolynomialDecay
from tfgptopt.quantization import Int8
from tfgptopt.training import describe, strategy


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))


def train(chosen):
    keras.utils.set_random_seed(3)
    with chosen.scope():
        model = make_gpt()
        model.compile(optimizer=keras.optimizers.Adam(1e-3), weighted_metrics=[])
    losses = Losses()
    callbacks = [
        Pruning(PolynomialDecay(0.0, 0.5, 5, 25, frequency=5)),
        QuantizationAwareTraining(Int8()),
        losses,
    ]
    inputs, labels = random_batch(rows=240)
    data = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8, drop_remainder=True)
    model.fit(data, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    return model, losses.values


def test_two_replicas_train_as_one():
    _, expected = train(strategy("default"))
    mirrored = strategy("mirrored")
    assert describe(mirrored) == "MirroredStrategy, 2 replicas"
    two, losses = train(mirrored)
    assert len(losses) == 30
    np.testing.assert_allclose(losses, expected, atol=1e-3)
    for target in select(two):
        mask = target.variable.constraint.mask._value
        copies = [copy.numpy() for copy in mask.values]
        np.testing.assert_array_equal(copies[0], copies[1])
        assert (copies[0] == 0).mean() == pytest.approx(0.5, abs=0.002)
        weights = [copy.numpy() for copy in target.variable._value.values]
        np.testing.assert_array_equal(weights[0], weights[1])
        assert (weights[0][copies[0] == 0] == 0).all()


def test_choice():
    assert describe(strategy("auto")) == "default strategy, 1 replica"
    with pytest.raises(ValueError, match="must be one of auto, default, mirrored, tpu"):
        strategy("gpu")
