import warnings

import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity, PolynomialDecay
from tfgptopt.quantization import Int8


class ZerosAfterEveryBatch(keras.callbacks.Callback):
    """Records the share of zeros of every kernel after every batch."""

    def __init__(self):
        super().__init__()
        self.shares = []

    def on_train_batch_end(self, batch, logs=None):
        kernels = [t.variable.numpy() for t in select(self.model)]
        self.shares.append([float((k == 0).mean()) for k in kernels])


def fit(model, callbacks, **kwargs):
    kwargs = {"batch_size": 4, "epochs": 1, "verbose": 0, **kwargs}
    return model.fit(*random_batch(rows=48), callbacks=callbacks, **kwargs)


def test_zeros_hold_after_every_batch():
    model = make_gpt(layers=1)
    model.compile(optimizer=keras.optimizers.Adam(1e-2, use_ema=True, ema_overwrite_frequency=2))
    zeros = ZerosAfterEveryBatch()
    fit(model, [Pruning(ConstantSparsity(0.5, 0, frequency=1000)), zeros])
    assert np.allclose(zeros.shares, 0.5, atol=0.002)
    # Also after `fit`, where Keras writes averages over the weights.
    assert all(np.isclose((t.variable.numpy() == 0).mean(), 0.5, atol=0.002) for t in select(model))


def test_follows_the_schedule_and_traces_the_step_once():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    traces = []
    step = model.train_step
    model.train_step = lambda *args: traces.append(1) or step(*args)
    schedule = PolynomialDecay(0.0, 0.8, 2, 10, frequency=2)
    zeros = ZerosAfterEveryBatch()
    history = fit(model, [Pruning(schedule), zeros])
    expected, held = [], 0.0
    for i in range(12):
        fires, sparsity = (float(x) for x in schedule(np.int64(i)))
        held = sparsity if fires else held
        expected.append(held)
    assert np.allclose(np.mean(zeros.shares, axis=1), expected, atol=0.002)
    # Keras traces twice: once to build, once with the optimizer's variables.
    assert len(traces) <= 2
    assert history.history["sparsity"][-1] == pytest.approx(0.8, abs=0.002)


@pytest.mark.parametrize("options", [{"steps_per_execution": 4}, {"jit_compile": True}])
def test_holds_in_compiled_multi_steps(options):
    model = make_gpt(layers=1)
    model.compile(optimizer="adam", **options)
    fit(model, [Pruning(PolynomialDecay(0.0, 0.5, 0, 8, frequency=4))])
    for target in select(model):
        assert (target.variable.numpy() == 0).mean() == pytest.approx(0.5, abs=0.002)


def test_a_constraint_of_the_user_still_holds_and_comes_back():
    layer = keras.layers.Dense(8, kernel_constraint=keras.constraints.MaxNorm(0.5))
    model = keras.Sequential([keras.Input((16,)), layer])
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse")
    own = layer.kernel.constraint
    x = np.random.default_rng(0).normal(0, 1, (32, 16))
    model.fit(x, x[:, :8] * 9, verbose=0, callbacks=[Pruning(ConstantSparsity(0.5, 0))])
    kernel = layer.kernel.numpy()
    assert (kernel == 0).mean() == 0.5
    assert (np.linalg.norm(kernel, axis=0) <= 0.5 + 1e-5).all()
    tfgptopt.finalize(model)
    assert layer.kernel.constraint is own


def test_second_fit_without_the_callback_holds_the_zeros_until_finalize():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    fit(model, [Pruning(ConstantSparsity(0.5, 0))])
    zeros = [t.variable.numpy() == 0 for t in select(model)]
    fit(model, [])
    for target, zero in zip(select(model), zeros, strict=True):
        np.testing.assert_array_equal(target.variable.numpy() == 0, zero)
    tfgptopt.finalize(model)
    for target, zero in zip(select(model), zeros, strict=True):
        np.testing.assert_array_equal(target.variable.numpy() == 0, zero)
        assert target.variable.constraint is None
    fit(model, [])
    assert all((t.variable.numpy() == 0).mean() < 0.01 for t in select(model))


def test_a_resumed_model_keeps_its_zeros(tmp_path):
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(16)])
    model.compile(optimizer="adam", loss="mse")
    x = np.random.default_rng(0).normal(0, 1, (48, 16))
    schedule = PolynomialDecay(0.0, 0.6, 0, 20, frequency=5)
    # Steps 0 to 11; the last mask comes from step 10.
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[Pruning(schedule)])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    expected = [t.variable.numpy() == 0 for t in select(model)]
    again.fit(x[:4], x[:4], batch_size=4, verbose=0, callbacks=[Pruning(schedule)])
    for target, zero in zip(select(again), expected, strict=True):
        np.testing.assert_array_equal(target.variable.numpy() == 0, zero)


def test_the_same_callback_object_works_after_finalize_and_after_compile():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    callback = Pruning(ConstantSparsity(0.5, 0, frequency=1))
    fit(model, [callback])
    tfgptopt.finalize(model)
    for target in select(model):
        target.variable.assign(target.variable + 0.5)
    fit(model, [callback])
    assert all((t.variable.numpy() == 0).mean() > 0.49 for t in select(model))
    for target in select(model):
        target.variable.constraint.mask.assign(np.ones(target.variable.shape))
        target.variable.assign(target.variable + 0.5)
    model.compile(optimizer="adam")
    fit(model, [callback], epochs=1)
    assert all((t.variable.numpy() == 0).mean() > 0.49 for t in select(model))


def test_one_shot_prune_then_train(gpt):
    tfgptopt.prune(gpt, 0.5, targets="feedforward")
    with pytest.raises(ValueError, match="is pruned already"):
        tfgptopt.prune(gpt, 0.3)
    gpt.compile(optimizer="adam")
    fit(gpt, [])
    shares = {t.path: (t.variable.numpy() == 0).mean() for t in select(gpt)}
    assert all((share > 0.49) == ("feedforward" in path) for path, share in shares.items())


def test_warns_with_the_numbers_when_training_is_too_short_or_too_late():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    with pytest.warns(UserWarning, match=r"ends at step 100, .* is 11 \(it runs from step 0\)"):
        fit(model, [Pruning(PolynomialDecay(0.0, 0.5, 0, 100, frequency=10))])
    with pytest.warns(UserWarning, match="ended at step 5, before .* begins at step 12"):
        fit(model, [Pruning(PolynomialDecay(0.0, 0.5, 0, 5, frequency=1))])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The pruning schedule")
        fit(model, [Pruning(ConstantSparsity(0.5, 0))])


def test_bad_input_changes_nothing():
    with pytest.raises(ValueError, match="must be a tfmot PruningSchedule"):
        Pruning(0.5)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        tfgptopt.prune(make_gpt(layers=1), 1.0)
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    before = model.get_weights()
    with pytest.raises(ValueError, match="matches none"):
        fit(model, [Pruning(ConstantSparsity(0.5, 0), targets="nothing")])
    with pytest.raises(ValueError, match="matches none"):
        rounding = QuantizationAwareTraining(Int8(), targets="nothing")
        fit(model, [Pruning(ConstantSparsity(0.5, 0)), rounding])
    assert all(t.variable.constraint is None for t in select(model))
    with pytest.raises(ValueError, match="Two prunings act on"):
        fit(model, [Pruning(ConstantSparsity(0.5, 0)), Pruning(ConstantSparsity(0.3, 0))])
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all(t.variable.constraint is None for t in select(model))
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Activation("relu")])
    plain.compile(loss="mse")
    with pytest.raises(ValueError, match="no weight to act on"):
        plain.fit(np.ones((4, 4)), np.ones((4, 4)), callbacks=[Pruning(ConstantSparsity(0.5, 0))])
