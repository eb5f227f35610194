"""Pruning under every way to train: optimizers, precisions, replicas, and runs that were killed."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import (
    NM,
    ConstantSparsity,
    Magnitude,
    Movement,
    PolynomialDecay,
    Unstructured,
    Wanda,
)
from tfgptopt.quantization import Int8


class MasksHold(keras.callbacks.Callback):
    """Checks after every batch that no masked weight is there, and counts zeros."""

    def __init__(self):
        super().__init__()
        self.shares = []

    def on_train_batch_end(self, batch, logs=None):
        zeros = total = 0
        for target in select(self.model):
            dropped = ~target.variable.constraint.mask.numpy()
            assert not target.variable.numpy()[dropped].any(), target.path
            zeros, total = zeros + dropped.sum(), total + dropped.size
        self.shares.append(zeros / total)


def fit(model, callbacks, **kwargs):
    kwargs = {"batch_size": 4, "epochs": 1, "verbose": 0, "shuffle": False, **kwargs}
    return model.fit(*random_batch(rows=32), callbacks=callbacks, **kwargs)


OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
    "momentum": lambda: keras.optimizers.SGD(1e-2, momentum=0.9, clipnorm=1.0),
    "lion": lambda: keras.optimizers.Lion(1e-3, weight_decay=0.1, clipvalue=0.5),
    "ema": lambda: keras.optimizers.Adam(1e-2, use_ema=True, ema_overwrite_frequency=2),
    "accumulation": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_masked_weight_after_any_batch(name):
    model = make_gpt(layers=1)
    model.compile(optimizer=OPTIMIZERS[name]())
    checker = MasksHold()
    fit(model, [Pruning(PolynomialDecay(0.0, 0.5, 1, 3, frequency=1), NM(2, 4)), checker])
    assert checker.shares[-1] == 0.5
    for target in select(model):
        kept = target.to_matrix(target.variable.value).numpy() != 0
        assert (kept.reshape(-1, 4, kept.shape[1]).sum(axis=1) <= 2).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = make_gpt(layers=1)
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras.optimizers.Adam(1e-2)
    if policy == "mixed_float16":
        # A first scale that overflows: such steps are skipped, and the masks hold all the same.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**40)
    model.compile(optimizer=optimizer)
    checker = MasksHold()
    schedule = ConstantSparsity(0.5, 0, frequency=1)
    fit(model, [Pruning(schedule, score=Magnitude()), checker], epochs=3)
    assert np.allclose(checker.shares, 0.5, atol=1e-3)


def test_compiled_by_xla():
    score = Movement()  # It reads gradients, besides what `Magnitude` reads.
    model = make_gpt(layers=1)
    model.compile(optimizer="adam", jit_compile=True, steps_per_execution=2)
    checker = MasksHold()
    fit(model, [Pruning(PolynomialDecay(0.0, 0.5, 2, 6, frequency=2), score=score), checker])
    assert checker.shares[-1] == pytest.approx(0.5, abs=1e-3)


def test_two_replicas_have_one_mask():
    score = Movement()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = make_gpt(layers=1)
        model.compile(optimizer="adam")
    checker = MasksHold()
    pattern = Unstructured(scope="model")
    fit(model, [Pruning(PolynomialDecay(0.0, 0.5, 2, 6, frequency=2), pattern, score), checker])
    assert checker.shares[-1] == pytest.approx(0.5, abs=1e-3)
    for target in select(model):
        for variable in (target.variable, target.variable.constraint.mask):
            one, other = (value.numpy() for value in variable.value.values)
            np.testing.assert_array_equal(one, other)


def test_movement_is_the_sum_of_weight_times_gradient():
    layer = keras.layers.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    generator = np.random.default_rng(0)
    x, y = generator.normal(0, 1, (6, 8, 4)), generator.normal(0, 1, (6, 8, 3))
    schedule = PolynomialDecay(0.0, 0.5, 6, 7, frequency=1)
    pruner = tfgptopt.pruning.Pruner(model, tfgptopt.pruning.Prune(schedule, score=Movement()))
    weights, expected = layer.kernel.numpy().astype(np.float64), 0.0
    for batch, labels in zip(x, y, strict=True):
        pruner.step()
        model.train_on_batch(batch, labels)
        gradient = 2 * batch.T @ (batch @ weights - labels) / labels.size
        expected = expected - weights * gradient
        weights = weights - 0.1 * gradient
    np.testing.assert_allclose(pruner.meter.variables(0)[0].numpy(), expected, rtol=1e-4, atol=1e-6)
    pruner.advance(7)
    order = np.argsort(-expected.reshape(-1))
    kept = np.zeros(12, bool)
    kept[order[:6]] = True
    np.testing.assert_array_equal(layer.kernel.numpy() != 0, kept.reshape(4, 3))


class Killed(Exception):
    pass


class KillAt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.at = step

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.at:
            raise Killed


def _model():
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(16)])
    # Zeros by chance, which are not masked and have to train on.
    kernel = model.layers[0].kernel
    kernel.assign(kernel * (np.arange(16 * 32).reshape(16, 32) % 5 > 0))
    model.compile(optimizer=keras.optimizers.AdamW(1e-2), loss="mse")
    return model


def _train(model, callbacks, epochs=5):
    x = np.random.default_rng(0).normal(0, 1, (32, 16))
    model.fit(x, x, batch_size=4, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks)


_SCORES = {"magnitude": Magnitude(), "movement": Movement()}


def _callbacks(score):
    schedule = PolynomialDecay(0.0, 0.6, 3, 29, frequency=3)
    return [Pruning(schedule, score=_SCORES[score]), QuantizationAwareTraining(Int8())]


@functools.cache
def _never_killed(score):
    model = _model()
    _train(model, _callbacks(score))
    return model


@pytest.mark.parametrize(
    ("killed_at", "score", "first"),
    [
        (9, "magnitude", "backup"),
        (9, "movement", "pruning"),
        (20, "movement", "backup"),
        (20, "magnitude", "pruning"),
        (31, "movement", "pruning"),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, killed_at, score, first):
    def callbacks(*more):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        before, behind = ([backup], []) if first == "backup" else ([], [backup])
        return [*before, *_callbacks(score), *behind, *more]

    with pytest.raises(Killed):
        _train(_model(), callbacks(KillAt(killed_at)))
    resumed, whole = _model(), _never_killed(score)
    _train(resumed, callbacks())
    for one, other in zip(resumed.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)
    for one, other in zip(select(resumed), select(whole), strict=True):
        mask, expected = (t.variable.constraint.mask.numpy() for t in (one, other))
        np.testing.assert_array_equal(mask, expected)


def test_checkpoints_go_from_pruned_to_plain_and_back(tmp_path):
    model = _model()
    _train(model, [Pruning(ConstantSparsity(0.5, 0, frequency=1))], epochs=1)
    model.save_weights(tmp_path / "pruned.weights.h5")
    plain = _model()
    plain.load_weights(tmp_path / "pruned.weights.h5")
    for one, other in zip(plain.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    _train(plain, [], epochs=1)
    assert all(t.variable.constraint is None for t in select(plain))
    plain.save_weights(tmp_path / "plain.weights.h5")
    model.load_weights(tmp_path / "plain.weights.h5")
    mask = model.weights[0].constraint.mask.numpy()
    np.testing.assert_array_equal(model.weights[0], plain.weights[0] * mask)


def test_a_loop_of_your_own():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    pruning = Pruning(PolynomialDecay(0.0, 0.5, 1, 3, frequency=1))
    with pytest.raises(ValueError, match=r"call `pruning\.set_model"):
        pruning.step()
    pruning.set_model(model)
    for _ in range(5):
        pruning.step()
        model.train_on_batch(*random_batch())
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all((t.variable.numpy() == 0).mean() > 0.49 for t in select(model))


def test_groups_have_their_own_pattern_and_sparsity():
    model = make_gpt()
    model.compile(optimizer="adam")
    attention = Pruning(ConstantSparsity(0.5, 0), NM(2, 4), targets="attention")
    feedforward = Pruning(ConstantSparsity(0.8, 0), targets="feedforward")
    fit(model, [attention, feedforward])
    rows = tfgptopt.pruning.report(model).rows
    for row in rows:
        wanted = (NM(2, 4), 0.5) if "attention" in row.path else (Unstructured(), 0.8)
        assert (row.pattern, row.target) == wanted
        assert row.holds
        assert row.sparsity == pytest.approx(wanted[1], abs=1e-3)
    assert len(rows) == 12


def test_nothing_is_pruned_where_weights_are_not_finite():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    target = select(model)[1]
    broken = target.variable.numpy()
    broken[0, 0, 0] = np.nan
    target.variable.assign(broken)
    with pytest.raises(ValueError, match=f"{target.path} has values that are NaN"):
        fit(model, [Pruning(ConstantSparsity(0.5, 0))])
    assert target.variable.constraint is None
    model = make_gpt(layers=1)
    model.compile(optimizer=keras.optimizers.SGD(1e30))
    with pytest.raises(ValueError, match="the training diverged"):
        fit(model, [Pruning(ConstantSparsity(0.5, 4))])
    assert all(t.variable.constraint.mask.numpy().all() for t in select(model))


def test_a_model_that_changed_is_refused_before_training():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    x = np.ones((8, 4), np.float32)
    model.compile(optimizer="adam", loss="mse")
    pruning = Pruning(ConstantSparsity(0.5, 0))
    model.fit(x, x, verbose=0, callbacks=[pruning])
    model.add(keras.layers.Dense(4))
    with pytest.raises(ValueError, match="was added to the model after pruning began"):
        model.fit(x, x, verbose=0, callbacks=[pruning])


def test_settings_that_do_not_go_together_are_refused_before_the_model_changes():
    model = make_gpt(layers=1)
    model.compile(optimizer="adam")
    before = model.get_weights()
    wrong = {
        "complete at sparsity 0.5": Pruning(ConstantSparsity(0.7, 0), NM(2, 4)),
        "Movement has seen no gradient": Pruning(ConstantSparsity(0.5, 0), score=Movement()),
        "does not fit into": Pruning(
            ConstantSparsity(0.5, 0), tfgptopt.pruning.Block(64, 64), targets="attention"
        ),
        "prunes at once": Pruning(ConstantSparsity(0.5, 0), score=tfgptopt.pruning.SparseGPT()),
        "needs calibration data": Pruning(ConstantSparsity(0.5, 0), score=tfgptopt.pruning.Wanda()),
    }
    with pytest.raises(ValueError, match="`pattern` must be"):
        Pruning(ConstantSparsity(0.5, 0), "2:4")
    for message, pruning in wrong.items():
        with pytest.raises(ValueError, match=message):
            fit(model, [pruning])
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_averages_are_held_in_a_fit_without_the_callback():
    model = _model()
    model.compile(optimizer=keras.optimizers.Adam(1e-2, use_ema=True), loss="mse")
    _train(model, [Pruning(ConstantSparsity(0.5, 0))], epochs=1)
    _train(model, [], epochs=1)
    for target in select(model):
        assert not target.variable.numpy()[~target.variable.constraint.mask.numpy()].any()


def test_a_schedule_that_starts_low_does_not_open_masks_again():
    model = _model()
    tfgptopt.prune(model, 0.5)
    shares = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            shares.append(min((t.variable.numpy() == 0).mean() for t in select(self.model)))

    _train(model, [Pruning(PolynomialDecay(0.0, 0.8, 0, 7, frequency=1)), Watch()], epochs=1)
    assert min(shares) >= 0.49
    assert shares[-1] >= 0.79


def test_movement_goes_on_after_compile():
    model = _model()
    pruning = Pruning(PolynomialDecay(0.0, 0.5, 20, 30, frequency=1), score=Movement())
    with pytest.warns(UserWarning, match="will not be reached"):
        _train(model, [pruning], epochs=1)
    before = pruning._pruner.meter.variables(0)[0].numpy().copy()
    old = model.optimizer
    model.compile(optimizer="adam", loss="mse")
    with pytest.warns(UserWarning, match="will not be reached"):
        _train(model, [pruning], epochs=1)
    assert not np.array_equal(pruning._pruner.meter.variables(0)[0].numpy(), before)
    tfgptopt.finalize(model)
    assert "update_step" not in vars(model.optimizer)
    assert "update_step" not in vars(old)


def test_a_recipe_dresses_a_model_before_a_checkpoint_is_read(tmp_path):
    model = _model()
    schedule = ConstantSparsity(0.5, 0)
    _train(model, [Pruning(schedule)], epochs=1)
    model.save_weights(tmp_path / "pruned.weights.h5")
    again = _model()
    _train(again, [], epochs=1)
    tfgptopt.Recipe((tfgptopt.recipe.Prune(schedule),)).replay(again)
    again.load_weights(tmp_path / "pruned.weights.h5")
    _train(again, [], epochs=1)
    for target, trained in zip(select(again), select(model), strict=True):
        mask = trained.variable.constraint.mask.numpy()
        np.testing.assert_array_equal(target.variable.constraint.mask.numpy(), mask)
        assert not target.variable.numpy()[~mask].any()


def test_wanda_in_fit_reads_its_data_at_each_change_and_early():
    model = _model()
    x = np.random.default_rng(3).normal(0, 1, (32, 16)).astype(np.float32)
    pruning = Pruning(ConstantSparsity(0.5, 2, frequency=1), Unstructured("output"), Wanda(x))
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            first, second = (layer.kernel.numpy().copy() for layer in self.model.layers)
            hidden = x @ first + self.model.layers[0].bias.numpy()
            seen.append(np.abs(second) * np.linalg.norm(hidden, axis=0)[:, None])

    _train(model, [Record(), pruning], epochs=1)
    kept = model.layers[1].kernel.constraint.mask.numpy()
    lowest_kept = np.where(kept, seen[-1], np.inf).min(axis=0)
    assert (np.where(kept, 0, seen[-1]).max(axis=0) <= lowest_kept * 1.0001).all()
    fresh = _model()
    with pytest.raises(ValueError, match="cannot read the calibration data"):
        _train(fresh, [Pruning(ConstantSparsity(0.5, 99), score=Wanda(x[:, :3]))], epochs=1)
    assert all(t.variable.constraint is None for t in select(fresh))


def test_two_prunings_on_one_weight_are_refused_in_a_loop_too():
    model = _model()
    one, other = (Pruning(ConstantSparsity(s, 0)) for s in (0.5, 0.3))
    one.set_model(model)
    other.set_model(model)
    one.step()
    other.step()
    with pytest.raises(ValueError, match="Two prunings act on"):
        one.step()
