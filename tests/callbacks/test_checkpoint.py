"""Trainings that are killed and resumed, and checkpoints that do not fit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import two_replicas
from tfgptopt.callbacks import Checkpoint, Pruning, QuantizationAwareTraining, TrainingProgress

from tfgptopt.file.locking import try_lock
from tfgptopt.pruning import ConstantSparsity, Movement, PolynomialDecay
from tfgptopt.quantization import Int8

STEPS = 6  # Batches of an epoch.


def make_model(width=24, seed=7):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(width), keras.layers.Dropout(0.3), keras.layers.Dense(16)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    model.compile(optimizer=keras.optimizers.AdamW(1e-2), loss="mse", metrics=["mae"])
    return model


def make_data(seed=3, values=0, repeat=False):
    keras.utils.set_random_seed(7)  # It is part of every seed.
    x = np.random.default_rng(values).normal(0, 1, (8 * STEPS, 16)).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, x)).shuffle(len(x), seed=seed).batch(8)
    return data.repeat() if repeat else data


class Killed(Exception):
    pass


class KillAt(keras.callbacks.Callback):
    """Ends a training behind a step, as if its process had ended there."""

    def __init__(self, step, how=None):
        super().__init__()
        self.at, self.how = step, how

    def on_train_batch_end(self, batch, logs=None):
        if int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) == self.at:
            if self.how is not None:
                os.kill(os.getpid(), self.how)
                return
            raise Killed


def techniques():
    pruning = Pruning(PolynomialDecay(0.0, 0.6, 2, 20, frequency=3), score=Movement())
    return [pruning, QuantizationAwareTraining(Int8(scale="learned"), freeze_step=18)]


def fit(model, data, callbacks=(), epochs=4, **options):
    return model.fit(
        data, epochs=epochs, verbose=0, shuffle=False,
        callbacks=[*techniques(), *callbacks], **options,
    ).history  # fmt: skip


def killed(folder, step, how=None, data=None, model=None, callbacks=(), **options):
    """Trains until a step at which the process ends."""
    checkpoint = Checkpoint(folder, save_freq=4)
    error = SystemExit if how else Killed
    last = [KillAt(step, how), checkpoint] if how else [checkpoint, KillAt(step)]
    callbacks = [*callbacks, *last]
    with pytest.raises(error) as raised:
        fit(model or make_model(), make_data() if data is None else data, callbacks, **options)
    checkpoint.folder.close()  # As the system does for a process that ends.
    return raised.value


def assert_equal(one, other):
    for ours, theirs in zip(
        [*one.get_weights(), *(v.numpy() for v in one.optimizer.variables)],
        [*other.get_weights(), *(v.numpy() for v in other.optimizer.variables)],
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def whole():
    """A training without checkpoints, and its history."""
    model = make_model()
    return model, fit(model, make_data())


@pytest.mark.parametrize("step", [5, 13])
def test_a_killed_run_ends_with_the_same_bits_and_the_same_history(step, tmp_path, whole):
    killed(tmp_path, step)
    model = make_model(seed=8)  # Whatever it begins with.
    np.random.seed(99)
    history = fit(model, make_data(), [Checkpoint(tmp_path, save_freq=4)])
    assert_equal(model, whole[0])
    for name, values in whole[1].items():
        np.testing.assert_allclose(history[name], values, rtol=1e-6, err_msg=name)


def test_a_run_that_began_with_gptq_is_resumed_without_it(tmp_path, monkeypatch):
    inputs = np.random.default_rng(5).normal(0, 1, (128, 16)).astype(np.float32)

    def rounding():
        return QuantizationAwareTraining(Int8(scale="learned"), method="gptq", data=inputs)

    def train(model, *callbacks):
        model.fit(
            make_data(), epochs=2, verbose=0, shuffle=False, callbacks=[rounding(), *callbacks]
        )

    whole, model = make_model(), make_model(seed=8)
    train(whole)
    checkpoint = Checkpoint(tmp_path, save_freq=4)
    with pytest.raises(Killed):
        train(make_model(), checkpoint, KillAt(9))
    checkpoint.folder.close()
    monkeypatch.setattr("tfgptopt.callbacks.quantization.quantize", None)
    train(model, Checkpoint(tmp_path, save_freq=4))
    assert_equal(model, whole)


@pytest.mark.parametrize(
    "options", [{"steps_per_epoch": 5}, {"steps_per_epoch": 5, "repeat": True}]
)
def test_epochs_that_are_no_passes_over_the_data(options, tmp_path):
    repeat = options.get("repeat", False)
    steps = {"steps_per_epoch": 5, "epochs": 4 if repeat else 1}
    model, resumed = make_model(), make_model(seed=9)
    fit(model, make_data(repeat=repeat), **steps)
    killed(tmp_path, 5 if not repeat else 14, data=make_data(repeat=repeat), **steps)
    fit(resumed, make_data(repeat=repeat), [Checkpoint(tmp_path)], **steps)
    assert_equal(resumed, model)


def test_a_process_that_is_killed_while_it_saves(tmp_path, whole):
    """The short form of benchmarks/kill_resume.py, in a process of its own."""
    code = "from callbacks import test_checkpoint as t; t.train_slowly()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = tmp_path / "run"
    while not (list(folder.glob(".step-*")) and list(folder.glob("step-*"))):
        assert child.poll() is None
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert list(folder.glob(".step-*")) and not list(folder.glob("step-*24"))
    model = make_model(seed=8)
    fit(model, make_data(), [Checkpoint(folder, save_freq=4)])
    assert_equal(model, whole[0])
    assert not list(folder.glob(".step-*"))


def train_slowly():
    """What the process does that is killed: each write of a checkpoint takes a while."""
    save_weights = keras.Model.save_weights

    def slow(self, *args, **kwargs):
        save_weights(self, *args, **kwargs)
        time.sleep(0.3)

    keras.Model.save_weights = slow
    fit(make_model(), make_data(), [Checkpoint("run", save_freq=4)])


def test_sigterm_saves_and_ends_with_a_code_of_its_own(tmp_path, whole):
    assert threading.current_thread() is threading.main_thread()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert killed(tmp_path, 9, signal.SIGTERM).code == Checkpoint.EXIT_CODE == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert sorted(path.name for path in tmp_path.glob("step-*"))[-1] == "step-0000000009"
    model = make_model(seed=8)
    fit(model, make_data(), [Checkpoint(tmp_path)])
    assert_equal(model, whole[0])


def test_a_damaged_checkpoint_is_left_for_the_one_before(tmp_path, whole):
    killed(tmp_path, 13)
    newest, *others = sorted(tmp_path.glob("step-*"), reverse=True)
    weights = newest / "model.weights.h5"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    spare = shutil.copytree(tmp_path, tmp_path.parent / "spare")
    model = make_model(seed=8)
    with pytest.warns(UserWarning, match=r"Damaged.*step-0000000012.*goes on from step-0000000008"):
        fit(model, make_data(), [Checkpoint(tmp_path)])
    assert_equal(model, whole[0])
    for path in others:
        (spare / path.name / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged"):
        fit(make_model(), make_data(), [Checkpoint(spare)])


def test_a_checkpoint_of_something_else_is_refused_before_anything_changes(tmp_path):
    killed(tmp_path, 9)

    def refused(match, model=None, data=None, callbacks=None, **options):
        model = model or make_model()
        before = [v.numpy() for v in model.variables]
        given = techniques() if callbacks is None else callbacks
        checkpoint = Checkpoint(tmp_path)
        with pytest.raises(ValueError, match=match):
            model.fit(
                make_data() if data is None else data, epochs=4, verbose=0, shuffle=False,
                callbacks=[*given, checkpoint], **options,
            )  # fmt: skip
        for variable, value in zip(model.variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)

    refused("another model. Received: kernel .16, 25.", make_model(25))
    other = make_model()
    other.compile(optimizer=keras.optimizers.AdamW(2e-2), loss="mse", metrics=["mae"])
    refused("another optimizer. Received: 0.0", other)
    refused("another recipe. Received", callbacks=[Pruning(ConstantSparsity(0.5, 0))])
    refused("are of other data: of 8 batches", data=make_data(values=1))
    refused("come in another order", data=make_data(seed=4))
    refused("fewer batches", data=make_data().take(1), steps_per_epoch=STEPS)
    refused("another number of steps", steps_per_epoch=3)
    begun = make_model()
    begun.optimizer.build(begun.trainable_variables)
    begun.optimizer.iterations.assign(5)
    refused("it began at step 0 of the optimizer, and this one begins at 5", begun)
    assert len(list(tmp_path.glob("step-*"))) == 2  # Nothing is lost.


def test_data_that_nobody_could_repeat_is_refused(tmp_path, monkeypatch):
    from tfgptopt.training import data_position

    monkeypatch.setattr(data_position.context, "global_seed", lambda: None)
    x = np.ones((16, 16), np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, x)).shuffle(16, seed=1).batch(8)
    model = make_model()
    model.fit(data, verbose=0, callbacks=[Checkpoint(tmp_path / "seeded")])
    with pytest.raises(ValueError, match="shuffled without a seed"):
        model.fit(x, x, verbose=0, callbacks=[Checkpoint(tmp_path / "arrays")])
    model.fit(x, x, verbose=0, shuffle=False, callbacks=[Checkpoint(tmp_path / "in order")])
    tf.random.set_seed(None)
    unseeded = tf.data.Dataset.from_tensor_slices((x, x)).shuffle(16).batch(8).prefetch(1)
    with pytest.raises(ValueError, match="shuffled without a seed"):
        model.fit(unseeded, verbose=0, callbacks=[Checkpoint(tmp_path / "unseeded")])


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    model = make_model()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="Cannot write checkpoints"):
        fit(model, make_data(), [Checkpoint(tmp_path / "file")])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / ".lock").touch()
    other = try_lock(tmp_path / "taken" / ".lock")
    with pytest.raises(ValueError, match="Another training writes checkpoints"):
        fit(model, make_data(), [Checkpoint(tmp_path / "taken")])
    os.close(other)
    with pytest.raises(ValueError, match="Two Checkpoints"):
        fit(model, make_data(), [Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "a")])
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"0 MB left, and 4 checkpoints take"):
        fit(model, make_data(), [Checkpoint(tmp_path / "full")])
    assert int(model.optimizer.iterations) == 0
    for wrong in ({"save_freq": 0}, {"save_freq": None}, {"keep": 0}, {"minutes": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Checkpoint(tmp_path, **wrong)


def test_a_disk_that_fills_up_does_not_end_the_training(tmp_path, whole, monkeypatch):
    save_weights = keras.Model.save_weights

    def failing(self, path, *args, **kwargs):
        if int(self.optimizer.iterations) > 9:
            raise OSError(28, "No space left on device")
        save_weights(self, path, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "save_weights", failing)
    model = make_model()
    with pytest.warns(UserWarning, match=r"No space left.*the last one is of step 8"):
        fit(model, make_data(), [Checkpoint(tmp_path, save_freq=4)])
    assert_equal(model, whole[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "step-0000000004", "step-0000000008"
    ]  # fmt: skip


def test_a_run_that_ended_is_restored_and_goes_on_only_if_asked(tmp_path, whole):
    model = make_model()
    progress = TrainingProgress(every=5)
    fit(model, make_data(), [progress, Checkpoint(tmp_path, save_freq="epoch", keep=2)])
    assert [p.name[-2:] for p in sorted(tmp_path.glob("step-*"))] == ["18", "24"]
    again, shown = make_model(seed=8), TrainingProgress(every=5)
    with pytest.warns(UserWarning, match="had ended after 24 steps"):
        history = fit(again, make_data(), [shown, Checkpoint(tmp_path)])
    assert_equal(again, whole[0])
    assert history["loss"] == pytest.approx(whole[1]["loss"])
    assert shown.history == progress.history and len(shown.history) == 5
    longer = make_model(seed=8)
    fit(longer, make_data(), [Checkpoint(tmp_path)], epochs=5)
    assert int(longer.optimizer.iterations) == 5 * STEPS
    # In the process that trained it, a second `fit` is another one.
    fit(longer, make_data(), [Checkpoint(tmp_path)], epochs=1)
    assert int(longer.optimizer.iterations) == 6 * STEPS


class Watched(keras.callbacks.Callback):
    """Says that the second epoch was the best."""

    def on_epoch_end(self, epoch, logs):
        logs["watched"] = abs(epoch - 1)


def test_best_weights_of_early_stopping_survive_with_masks_and_scales(tmp_path):
    def stopping():
        one = keras.callbacks.EarlyStopping(
            "watched", patience=2, mode="min", restore_best_weights=True
        )
        return [Watched(), one]

    model, resumed = make_model(), make_model(seed=9)
    with pytest.warns(UserWarning, match="before the pruning schedule ended"):
        fit(model, make_data(), stopping(), epochs=9)
    assert int(model.optimizer.iterations) == 4 * STEPS
    killed(tmp_path, 14, callbacks=stopping(), epochs=9)
    with pytest.warns(UserWarning, match="before the pruning schedule ended"):
        fit(resumed, make_data(), [*stopping(), Checkpoint(tmp_path)], epochs=9)
    assert_equal(resumed, model)
    for one, other in zip(model.get_weights().states, resumed.get_weights().states, strict=True):
        assert keras.tree.map_structure(np.array_equal, one, other) in (True, (True,))


def test_minutes(tmp_path):
    checkpoint = Checkpoint(tmp_path, None, keep=9, minutes=1e-9)
    make_model().fit(make_data(), verbose=0, shuffle=False, callbacks=[checkpoint])
    assert len(list(tmp_path.glob("step-*"))) == STEPS


def test_two_replicas_go_on_with_the_same_bits(tmp_path):
    def make():
        with two_replicas().scope():
            return make_model()

    model, resumed = make(), make()
    model.fit(make_data(), epochs=2, verbose=0, shuffle=False)
    checkpoint = Checkpoint(tmp_path, save_freq=4)
    with pytest.raises(Killed):
        make().fit(
            make_data(), epochs=2, verbose=0, shuffle=False, callbacks=[checkpoint, KillAt(9)]
        )
    checkpoint.folder.close()
    resumed.fit(make_data(), epochs=2, verbose=0, shuffle=False, callbacks=[Checkpoint(tmp_path)])
    assert_equal(resumed, model)
