"""A second `fit` runs the step that the first one traced; scales move only while they are to."""

import keras
import numpy as np
import pytest
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining, Regularization

import tfgptopt
from tfgptopt.pruning import ConstantSparsity, GroupLasso, Rows
from tfgptopt.quantization import Int8
from tfgptopt.quantization.quantizers import quantizers_of


class CountedTraces(keras.callbacks.Callback):
    """Counts how often Python runs the step, which is once for each trace."""

    def set_model(self, model):
        super().set_model(model)
        if "train_step" not in vars(model):
            step = model.train_step

            def counted(data):
                model.traces += 1
                return step(data)

            object.__setattr__(model, "train_step", counted)
            object.__setattr__(model, "traces", 0)


X = np.random.default_rng(0).normal(0, 1, (8, 16)).astype(np.float32)


def small(optimizer=None, adapters=False):
    keras.utils.set_random_seed(2)
    dense = keras.layers.Dense
    layers = [dense(24, name="attention"), dense(16, name="feedforward")]
    model = keras.Sequential([keras.Input((16,)), *layers])
    if adapters:
        for layer in layers:
            layer.enable_lora(2)
    model.compile(optimizer=optimizer or keras.optimizers.Adam(1e-2), loss="mse")
    return model


def callbacks():
    return [
        Pruning(ConstantSparsity(0.5, 0, frequency=1)),
        QuantizationAwareTraining(Int8(scale="learned"), freeze_step=10**6),
        Regularization(GroupLasso(1e-4, Rows()), targets="feedforward"),
    ]


def scales(model):
    found = [q for layer in model._flatten_layers() for q in quantizers_of(layer)]
    return [q.kept.numpy() for q in found if q.kept is not None]


def fit(model, given):
    model.fit(X, X, batch_size=4, verbose=0, shuffle=False, callbacks=given)


def test_further_fits_trace_nothing_and_scales_move_with_the_callback_only():
    model = small()
    counted, given = CountedTraces(), callbacks()
    fit(model, [counted, *given])
    traces, first = model.traces, scales(model)
    assert traces >= 1
    fit(model, [*given])
    second = scales(model)
    fit(model, callbacks())  # As a notebook cell that is run again.
    third = scales(model)
    fit(model, [])
    assert model.traces == traces
    for one, other, last in zip(first, second, third, strict=True):
        assert (one != other).any() and (other != last).any()
    for before, after in zip(third, scales(model), strict=True):
        np.testing.assert_array_equal(before, after)


def test_groups_with_learned_scales_of_their_own_all_learn():
    model = small()
    groups = [QuantizationAwareTraining(Int8(scale="learned"), targets=name)
              for name in ("attention", "feedforward")]  # fmt: skip
    fit(model, groups)
    first = scales(model)
    fit(model, groups)
    assert len(first) == 2
    assert all((a != b).any() for a, b in zip(first, scales(model), strict=True))


@pytest.mark.parametrize("compiled_again", [False, True])
def test_adapters_beside_weights_that_are_rounded_once(compiled_again):
    """Their rounded form is a constant of the step; the step finds it again."""
    models = []
    for again in (True, False):
        model = small(keras.optimizers.SGD(0.1), adapters=True)
        qat = QuantizationAwareTraining(Int8())
        fit(model, [CountedTraces(), qat])
        traces = model.traces
        if compiled_again:
            model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        if again:
            fit(model, [qat])
            assert (model.traces == traces) is not compiled_again
        else:
            fit(model, [])  # Rounds them anew in each step, with the same numbers.
        models.append(model)
    for one, other in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_weights_that_were_loaded_between_fits_are_rounded_anew(tmp_path):
    model, other = (small(keras.optimizers.SGD(0.0), adapters=True) for _ in range(2))
    for variable in other.weights:
        variable.assign(variable * 1.5)
    for one in (model, other):
        one.optimizer.build(one.trainable_variables)
    qat = QuantizationAwareTraining(Int8())
    fit(model, [qat])
    other.save_weights(tmp_path / "c.weights.h5")
    model.load_weights(tmp_path / "c.weights.h5")
    tfgptopt.quantize_aware(other, Int8())
    expected = other.evaluate(X, X, verbose=0)
    assert model.evaluate(X, X, verbose=0) == pytest.approx(expected)
    seen = model.fit(X, X, verbose=0, callbacks=[qat]).history["loss"][0]
    assert seen == pytest.approx(expected, rel=1e-5)
