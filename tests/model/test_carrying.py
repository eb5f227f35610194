"""Masks and scales come back with the weights that they belong to."""

from __future__ import annotations

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import NM, ConstantSparsity, PolynomialDecay
from tfgptopt.quantization import Int4, Int8


def model_and_data(inputs: int = 32):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((inputs,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(4)]
    )
    model.compile(optimizer=keras.optimizers.Adam(3e-2), loss="mse")
    generator = np.random.default_rng(0)
    x = generator.normal(0, 1, (64, inputs)).astype(np.float32)
    return model, x, np.tanh(x @ generator.normal(0, 1, (inputs, 4))).astype(np.float32)


def zeros(model) -> list[float]:
    return [float((t.variable.numpy() == 0).mean()) for t in select(model)]


class Worse(keras.callbacks.Callback):
    """Says that the second epoch was the best."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_epoch_end(self, epoch, logs):
        self.losses.append(logs["val_loss"])
        logs["watched"] = abs(epoch - 1)


def stopping():
    return keras.callbacks.EarlyStopping(
        "watched", patience=2, mode="min", restore_best_weights=True
    )


def test_early_stopping_brings_masks_back():
    model, x, y = model_and_data()
    pruning, seen = Pruning(PolynomialDecay(0.0, 0.9, 2, 14, frequency=1)), Worse()
    with pytest.warns(UserWarning, match="before the pruning schedule ended"):
        model.fit(x, y, 16, 9, verbose=0, validation_data=(x, y),
                  callbacks=[pruning, seen, stopping()])  # fmt: skip
    assert len(seen.losses) == 4
    assert model.evaluate(x, y, verbose=0) == pytest.approx(seen.losses[1], rel=1e-6)
    share = np.average(zeros(model), weights=[t.size for t in select(model)])
    assert 0.1 < share < 0.85 and pruning.sparsity == pytest.approx(share, abs=1e-6)
    before = model.predict(x, verbose=0)
    tfgptopt.finalize(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    model.set_weights(model.get_weights())
    assert type(model.get_weights()) is list


@pytest.mark.parametrize(
    "callback",
    [
        QuantizationAwareTraining(Int4(scale="learned")),
        QuantizationAwareTraining(Int4(), freeze_step=10),
        QuantizationAwareTraining(Int8(scale="learned"), freeze_step=6),
    ],
)
def test_early_stopping_brings_scales_back(callback, tmp_path):
    model, x, y = model_and_data()
    seen = Worse()
    model.fit(x, y, 16, 9, verbose=0, validation_data=(x, y),
              callbacks=[callback, seen, stopping()])  # fmt: skip
    assert len(set(seen.losses)) == 4
    restored = model.evaluate(x, y, verbose=0)
    assert restored == pytest.approx(seen.losses[1], rel=1e-6)
    before = model.predict(x, verbose=0)
    path = tfgptopt.export(model, tmp_path / "folder")
    import tensorflow as tf

    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    np.testing.assert_allclose(next(iter(served(tf.constant(x)).values())), before, atol=1e-5)


def test_weights_of_which_nothing_is_known_are_pruned_at_once():
    model, x, _ = model_and_data()
    dense = model.get_weights()
    tfgptopt.prune(model, 0.5)
    kept = [t.variable.numpy() != 0 for t in select(model)]
    model.set_weights(dense)
    for target, before, mask in zip(select(model), (dense[0], dense[2]), kept, strict=True):
        np.testing.assert_array_equal(target.variable.numpy(), np.where(mask, before, 0))
    layer = model.layers[0]
    layer.set_weights([np.ones_like(dense[0]), dense[1]])
    np.testing.assert_array_equal(layer.kernel.numpy(), kept[0])
    expected = model.predict(x, verbose=0)
    tfgptopt.finalize(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def through_keras(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def cloned(model, folder):
    copied = keras.models.clone_model(model)
    copied.set_weights([np.array(weight) for weight in model.get_weights()])
    return copied


COPIES = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "keras": through_keras,
    "clone": cloned,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("rounded", [False, True])
def test_copies_keep_their_masks(how, rounded, tmp_path):
    model, x, y = model_and_data()
    tfgptopt.prune(model, pattern=NM(2, 4))
    if rounded:
        tfgptopt.quantize_aware(model, Int8())
    twin = COPIES[how](model, tmp_path)
    np.testing.assert_allclose(twin.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    kept = [t.variable.numpy() != 0 for t in select(twin)]
    twin.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
    twin.fit(x, y, verbose=0)
    for target, mask in zip(select(twin), kept, strict=True):
        assert mask.mean() == 0.5
        np.testing.assert_array_equal(target.variable.numpy() != 0, mask)
    report = tfgptopt.pruning.report(twin)
    assert report.holds and report.rows[0].pattern == NM(2, 4)
    tfgptopt.finalize(twin)
    assert [type(layer).__mro__[0] for layer in twin.layers] == [keras.layers.Dense] * 2


def test_masks_and_rounding_are_taken_off_in_either_order():
    for first in ("prune", "quantize"):
        model, _, _ = model_and_data()
        steps = {
            "prune": lambda m: tfgptopt.prune(m, 0.5),
            "quantize": lambda m: tfgptopt.quantize_aware(m, Int8()),
        }
        steps.pop(first)(model)
        next(iter(steps.values()))(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tfgptopt.finalize(model)
        assert all(type(layer) is keras.layers.Dense for layer in model.layers)


def test_a_schedule_without_a_name_is_said_to_be_lost(tmp_path):
    class Own(ConstantSparsity):
        pass

    model, x, y = model_and_data()
    model.fit(x, y, verbose=0, callbacks=[Pruning(Own(0.5, 0, frequency=1))])
    with pytest.warns(UserWarning, match="zeros are not held"):
        twin = copy.deepcopy(model)
    np.testing.assert_allclose(twin.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    assert zeros(copy.deepcopy(twin)) == zeros(model)
