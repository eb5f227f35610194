"""What the monitor says of `fit`, against what is known of it."""

import json
import time
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch, two_replicas
from tfgptopt.callbacks import PerformanceMonitor, Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.evaluation.loss import keras_loss
from tfgptopt.pruning import ConstantSparsity
from tfgptopt.quantization import Int4

STEPS = 6


def batches(count=STEPS, seed=0):
    return tf.data.Dataset.from_tensors(random_batch(seed=seed)).repeat(count)


def compiled(model, **settings):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.25, **settings), loss=loss, sampler="greedy")
    return model


def norm_of_gradients(model, batch):
    (inputs, labels), loss = batch, model.loss
    with tf.GradientTape() as tape:
        value = loss(labels, model(inputs, training=True))
    gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
    squares = [np.square(tf.convert_to_tensor(grad).numpy()).sum() for grad in gradients]
    return np.sqrt(np.sum(squares))


def test_reports_say_what_happened(gpt, tmp_path):
    compiled(gpt)
    monitor = PerformanceMonitor(tmp_path, frequency=2, run="test")
    expected = norm_of_gradients(gpt, random_batch())
    gpt.fit(monitor.watch(batches(1)), verbose=0, callbacks=[monitor])
    assert monitor.history[-1]["gradient_norm"] == pytest.approx(expected, rel=1e-4)
    history = gpt.fit(monitor.watch(batches()), epochs=2, verbose=0, callbacks=[monitor]).history
    reports = monitor.history[1:]
    assert [one["step"] for one in reports if "sparsity" not in one][:3] == [3, 5, 7]
    losses = [one["loss"] for one in reports if one["epoch"] == 1 and "loss" in one]
    assert np.mean(losses) == pytest.approx(history["loss"][1], rel=1e-5)
    assert all(one["learning_rate"] == 0.25 and one["nonfinite_steps"] == 0 for one in reports)
    assert sum(one.get("tokens", 0) for one in reports) == 2 * STEPS * 8 * 16
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [one["step"] for one in monitor.history]
    assert lines[-1]["gradient_norm"] == monitor.history[-1]["gradient_norm"]
    events = [
        value.tag
        for path in tmp_path.glob("events*")
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    ]
    assert events.count("tokens_per_second") >= 3 and "step_seconds_p95" in events


def test_waiting_for_data_is_told_from_computing(gpt, tmp_path):
    compiled(gpt)

    def slow(x, y):
        with tf.control_dependencies([tf.numpy_function(lambda: (time.sleep(0.15), 0)[1], [],
                                                        tf.int64)]):  # fmt: skip
            return tf.nest.map_structure(tf.identity, (x, y))

    shares = {}
    for name, data in (("slow", batches(8).map(slow)), ("fast", batches(8).prefetch(8))):
        monitor = PerformanceMonitor(tmp_path / name, frequency=100)
        gpt.fit(monitor.watch(data), epochs=2, verbose=0, callbacks=[monitor])
        shares[name] = monitor.history[-1]["data_wait_share"]
    assert shares["slow"] > 0.35 and shares["fast"] < shares["slow"] / 2


def test_sparsity_noise_and_a_probe(gpt, tmp_path):
    compiled(gpt)
    inputs, labels = random_batch(seed=3)
    probe = tf.data.Dataset.from_tensors((inputs, labels, np.ones(labels.shape, np.float32)))
    monitor = PerformanceMonitor(tmp_path, probe=probe)
    techniques = [Pruning(ConstantSparsity(0.5, 0)), QuantizationAwareTraining(Int4())]
    gpt.fit(batches(), verbose=0, callbacks=[*techniques, monitor])
    last = monitor.history[-1]
    report = tfgptopt.pruning.report(gpt)
    assert last["sparsity"]["kernel"] == pytest.approx(report.sparsity, abs=1e-6)
    error = total = 0.0
    for layer in gpt._flatten_layers():
        for quantizer in tfgptopt.quantization.quantizers.quantizers_of(layer):
            exact = quantizer.variable.numpy()
            if layer.name.startswith(("query", "key", "value", "attention", "feedforward")):
                error += np.square(quantizer.rounded(exact).numpy() - exact).sum()
                total += np.square(exact).sum()
    assert last["rounding_noise"]["kernel"] == pytest.approx(np.sqrt(error / total), rel=1e-3)
    assert last["probe_perplexity"] == pytest.approx(np.exp(keras_loss(gpt, probe)), rel=1e-5)


def test_steps_that_are_not_finite_are_counted(gpt, tmp_path):
    compiled(gpt)
    inputs, labels = random_batch()
    weights = np.ones(labels.shape, np.float32)
    broken = weights * np.nan
    data = tf.data.Dataset.from_generator(
        lambda: ((inputs, labels, w) for w in (weights, broken, weights, broken)),
        output_signature=tf.nest.map_structure(
            lambda x: tf.TensorSpec(x.shape, x.dtype), (inputs, labels, weights)
        ),
    )
    monitor = PerformanceMonitor(tmp_path)
    gpt.fit(data, verbose=0, callbacks=[monitor])
    assert monitor.history[-1]["nonfinite_steps"] == 3  # The weights stay NaN.
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None


def test_several_replicas_and_steps_in_one_call(tmp_path):
    with two_replicas().scope():
        model = compiled(make_gpt())
    monitor = PerformanceMonitor(tmp_path, frequency=2)
    model.fit(batches(4), verbose=0, callbacks=[monitor])
    assert np.isfinite(monitor.history[-1]["gradient_norm"])
    alone = make_gpt()
    compiled(alone)
    alone.steps_per_execution = 2
    monitor = PerformanceMonitor(tmp_path, frequency=2)
    alone.fit(monitor.watch(batches(4)), verbose=0, callbacks=[monitor])
    assert [one["step"] for one in monitor.history] == [2, 4, 4]
    assert sum(one.get("tokens", 0) for one in monitor.history) == 4 * 8 * 16


def test_a_model_that_is_watched_trains_to_the_same_weights(tmp_path):
    found = []
    for watched in (False, True):
        keras.utils.set_random_seed(2)
        model = compiled(make_gpt())
        monitor = PerformanceMonitor(tmp_path)
        model.fit(batches(4), verbose=0, callbacks=[monitor] if watched else [])
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_prometheus_reads_a_training(gpt, tmp_path):
    compiled(gpt)
    read = []

    class Ask(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with urllib.request.urlopen(f"http://127.0.0.1:{monitor.port}/metrics") as response:
                read.append(response.read().decode())

    monitor = PerformanceMonitor(port=0, frequency=2, run="mine")
    gpt.fit(
        monitor.watch(batches()),
        verbose=0,
        callbacks=[Pruning(ConstantSparsity(0.5, 0)), monitor, Ask()],
    )
    numbers = dict(line.rsplit(" ", 1) for line in read[-1].splitlines() if line[0] != "#")
    assert float(numbers['tfgptopt_train_steps_total{run="mine"}']) == STEPS - 1  # Not the first.
    assert float(numbers['tfgptopt_train_step_seconds_count{run="mine"}']) == STEPS - 1
    assert float(numbers['tfgptopt_train_tokens_total{run="mine"}']) == STEPS * 8 * 16
    assert numbers['tfgptopt_train_running{run="mine"}'] == "1.0"
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{monitor.port}/metrics")


def test_bad_input(gpt, tmp_path):
    with pytest.raises(ValueError, match="writes nowhere"):
        PerformanceMonitor()
    with pytest.raises(ValueError, match="frequency"):
        PerformanceMonitor(tmp_path, frequency=0)
    compiled(gpt)
    first = PerformanceMonitor(port=0)
    first.set_model(gpt)
    first.on_train_begin()
    taken = PerformanceMonitor(port=first.port)
    with pytest.raises(ValueError, match=f"Cannot answer Prometheus on 127.0.0.1:{first.port}"):
        gpt.fit(batches(), verbose=0, callbacks=[taken])
    first.on_train_end()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write into"):
        gpt.fit(batches(), verbose=0, callbacks=[PerformanceMonitor(tmp_path / "file")])
