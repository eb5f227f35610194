import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity
from tfgptopt.quantization import Int4, Int8
from tfgptopt.quantization.layers import is_dressed
from tfgptopt.quantization.quantizers import quantizers_of


def fit(model, callbacks, **kwargs):
    data = random_batch(rows=32)
    return model.fit(*data, batch_size=4, verbose=0, callbacks=callbacks, **kwargs)


def dressed(model):
    return [is_dressed(t.layer) for t in select(model, roles=("kernel", "embedding"))]


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}])
def test_evaluate_after_fit_uses_the_rounded_arithmetic(options):
    model = make_gpt(layers=1)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), **options)
    fit(model, [])  # Functions exist and must be traced anew.
    plain = model.evaluate(*random_batch(seed=5), verbose=0)[0]
    fit(model, [QuantizationAwareTraining(Int4())])
    assert all(dressed(model))
    rounded = model.evaluate(*random_batch(seed=5), verbose=0)[0]
    logits = model(random_batch(seed=5)[0])
    labels = random_batch(seed=5)[1]
    direct = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits)
    assert rounded == pytest.approx(float(direct), rel=1e-4)
    assert rounded != pytest.approx(plain, rel=1e-6)


def test_start_step():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    callback = QuantizationAwareTraining(Int8(), start_step=5)
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(all(dressed(model)))
    )
    fit(model, [callback, watch])
    assert seen == [False] * 5 + [True] * 3


def test_pruning_and_quantization_together_ship_zeros_on_the_grid():
    model = make_gpt(layers=1)
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    fit(model, [Pruning(ConstantSparsity(0.5, 0)), QuantizationAwareTraining(Int4())])
    zeros = [t.variable.constraint.mask.numpy() == 0 for t in select(model)]
    tfgptopt.finalize(model)
    for target, zero in zip(select(model), zeros, strict=True):
        kernel = target.variable.numpy()
        assert zero.mean() == pytest.approx(0.5, abs=0.01)
        assert (kernel[zero] == 0).all()
        scale = np.abs(kernel).max(target.input_axes, keepdims=True) / 7
        np.testing.assert_allclose(kernel / scale, np.round(kernel / scale), atol=1e-3)


def test_the_same_cell_run_again_continues_and_another_spec_is_refused():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    fit(model, [QuantizationAwareTraining(Int8())])
    fit(model, [QuantizationAwareTraining(Int8())])
    with pytest.raises(ValueError, match=r"already, with Int8\(\). Received: Int4"):
        fit(model, [QuantizationAwareTraining(Int4())])
    assert all(dressed(model))


def test_bad_input():
    with pytest.raises(ValueError, match=r"must be Int8\(\) or Int4\(\)"):
        QuantizationAwareTraining("int4")
    with pytest.raises(ValueError, match="int >= 0"):
        QuantizationAwareTraining(Int8(), start_step=-1)
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    with pytest.raises(ValueError, match="matches none"):
        fit(model, [QuantizationAwareTraining(Int8(), targets="nothing")])
    assert not any(dressed(model))


def test_frozen_weights_are_rounded_once_and_count_as_ever():
    """With LoRA, what is frozen keeps its rounded form while `fit` runs, and not behind it."""
    from tfgptopt.quantization.quantizers import quantizers_of

    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            found = [q for layer in self.model._flatten_layers() for q in quantizers_of(layer)]
            seen.append(sum(q.given is not None for q in found))

    losses = {}
    for watched in (True, False):
        keras.utils.set_random_seed(0)
        model = make_gpt()
        model.backbone.enable_lora(2)
        model.compile(optimizer=keras.optimizers.Adam(1e-2), weighted_metrics=[])
        if watched:
            callbacks = [QuantizationAwareTraining(Int8()), Watch()]
        else:
            tfgptopt.quantize_aware(model, Int8())  # Rounds at every step.
            callbacks = []
        history = model.fit(*random_batch(), epochs=3, verbose=0, callbacks=callbacks)
        losses[watched] = history.history["loss"]
        inputs, _ = random_batch(seed=5)
        losses[watched].append(float(np.sum(model.predict(inputs, verbose=0) ** 2)))
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-6)
    # The table and both feed-forward kernels of two layers, keys and outputs of attention.
    assert min(seen) == max(seen) == 9
    assert all(q.given is None for layer in model._flatten_layers() for q in quantizers_of(layer))


def gptq_training(spec=None, data=None):
    calibration = random_batch(rows=16, seed=9) if data is None else data
    return QuantizationAwareTraining(spec or Int4(), method="gptq", data=calibration)


def state(model):
    rounders = [one for t in select(model, roles=("kernel", "embedding"))
                for one in quantizers_of(t.layer)]  # fmt: skip
    return [*model.get_weights(), *(one.kept.numpy() for one in rounders)]


def test_rounding_may_begin_with_gptq():
    model, expected = make_gpt(layers=1), make_gpt(layers=1)
    expected.set_weights(model.get_weights())
    tfgptopt.quantize(expected, Int4(), "gptq", random_batch(rows=16, seed=9))
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    fit(model, [gptq_training()])
    for found, wanted in zip(state(model), state(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)
    fit(model, [gptq_training()])  # A second `fit` finds the layers rounded.
    for found, wanted in zip(state(model), state(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_student_may_begin_with_gptq():
    model = make_gpt(layers=1)
    distiller = tfgptopt.Distiller(model, "self")
    distiller.compile(optimizer=keras.optimizers.Adam(1e-4))
    distiller.fit(
        *random_batch(rows=8), batch_size=4, verbose=0,
        callbacks=[gptq_training(Int4(scale="learned"))],
    )  # fmt: skip
    scales = state(model)[len(model.get_weights()) :]
    nearest = make_gpt(layers=1)
    tfgptopt.quantize(nearest, Int4(scale="learned"), "rtn")
    others = state(nearest)[len(nearest.get_weights()) :]
    assert any((found != other).any() for found, other in zip(scales, others, strict=True))


def test_how_rounding_may_not_begin():
    with pytest.raises(ValueError, match="come before `fit`"):
        QuantizationAwareTraining(Int4(), method=("rotation", "gptq"))
    with pytest.raises(ValueError, match="`method` must be"):
        QuantizationAwareTraining(Int4(), method="best")
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    with pytest.raises(ValueError, match="give `data`"):
        fit(model, [QuantizationAwareTraining(Int4(), method="gptq")])
    assert not any(dressed(model))
