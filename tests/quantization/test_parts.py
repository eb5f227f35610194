"""Products that are cut along their inputs into parts with scales of their own."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from conftest import make_gpt, random_batch
from decoder.families import CONTEXT, VOCABULARY, logits, make, prompt

import tfgptopt
from tfgptopt.calibration.batches import batches_of
from tfgptopt.calibration.watching import observe_all
from tfgptopt.decoder import read_decoder
from tfgptopt.exporting import TFLite
from tfgptopt.model.targets import target_of
from tfgptopt.quantization import Int4, Int8, rounding, sort_neurons
from tfgptopt.quantization.row_rounding import fake_quantize_rows
from tfgptopt.quantization.sorting import neurons_of
from tfgptopt.quantization.specs import deserialize_spec

TEXT = prompt(40)


def windows(count=4, length=48):
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (count, length), np.int32)
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


def sizes_of_neurons(model, data):
    found = {}

    def gather(target, rows):
        found[target.path] = np.abs(rows.numpy()).max(0)

    observe_all(model, [one.down for one in neurons_of(model)], batches_of(data), gather)
    return list(found.values())


@pytest.mark.parametrize("name", ["GPT2", "Llama3"])
def test_sorted_neurons_change_nothing_in_floats(name):
    model = make(name)
    expected = logits(model, TEXT)
    before = sizes_of_neurons(model, windows())
    sort_neurons(model, windows())
    assert np.abs(logits(model, TEXT) - expected).max() < 1e-4 * expected.std()
    for was, now in zip(before, sizes_of_neurons(model, windows()), strict=True):
        np.testing.assert_allclose(now, -np.sort(-was), rtol=1e-4)
        assert (np.diff(was) > 0).any()


def integers_of_file(path):
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    tensors = [t for t in file.subgraphs[0].tensors if t.type == schema.TensorType.INT8]
    return {
        t.name.decode(): (
            np.asarray(file.buffers[t.buffer].data, np.uint8).view(np.int8).reshape(t.shape),
            np.asarray(t.quantization.scale, np.float32),
        )
        for t in tensors
        if t.name
    }


def test_files_hold_and_compute_what_the_model_does(tmp_path):
    model = make("Llama3")
    whole = logits(tfgptopt.quantize_aware(make("Llama3"), Int8()), TEXT)
    tfgptopt.quantize(model, Int8(activation_blocks=4), ("sorting", "gptq"), windows())
    expected = logits(model, TEXT)
    path = tfgptopt.export(model, tmp_path / "gpt.tflite", TFLite(CONTEXT))
    engine = tfgptopt.TFLiteCausalLM(path)._engine
    found = engine.score(engine.new_cache(), TEXT)
    # One activation at the edge between two integers may fall either way.
    assert np.abs(found - expected).max() < 0.02 * expected.std()
    assert np.abs(whole - expected).max() > 0.02 * expected.std()
    stored = integers_of_file(path)
    down = target_of(model.backbone.transformer_layers[0]._feedforward_output_dense)
    integers, scale = rounding.quantize(
        down.variable.value, rounding.Grid(8, (0,)), down.layer._tfgptopt_rounders["main"].kept
    )
    parts = [stored[f"{down.path}/{i}"] for i in range(4)]
    np.testing.assert_array_equal(np.concatenate([p for p, _ in parts], 1), integers.numpy().T)
    for _, its in parts:
        np.testing.assert_array_equal(its, np.reshape(scale, -1))
    matrices = list(read_decoder(model).matrices())
    assert [m.activation_blocks for m in matrices] == [1] + [4] * (len(matrices) - 1)
    # What is recorded of the model says so, and what was recorded before is as it was.
    assert deserialize_spec({"name": "int8", "activations": "dynamic"}) == Int8()


def gpt_with_large_neurons():
    """Returns a GPT-2 of whose neurons one in four is 200 times as large, and read by nothing."""
    keras.utils.set_random_seed(1)
    model = make_gpt()
    large = np.arange(64) % 4 == 0
    factors = np.where(large, np.float32(200), np.float32(1))
    for block in model.backbone.transformer_layers:
        up, down = block._feedforward_intermediate_dense, block._feedforward_output_dense
        up.activation = keras.activations.relu  # Makes of a larger input one that is as much so.
        up.kernel.assign(up.kernel * factors * 10)
        up.bias.assign(up.bias * factors)
        down.kernel.assign(np.where(large[:, np.newaxis], 0, down.kernel * 10))
    return model


def test_large_neurons_cost_only_each_other():
    inputs, _ = random_batch(16)
    exact = np.asarray(gpt_with_large_neurons()(inputs))
    errors = {}
    for name, spec, method in (
        ("whole", Int8(), "rtn"),
        ("cut", Int8(activation_blocks=4), "rtn"),
        ("sorted", Int8(activation_blocks=4), "sorting"),
    ):
        model = gpt_with_large_neurons()
        tfgptopt.quantize(model, spec, method, inputs, targets="feedforward_output")
        errors[name] = np.square(np.asarray(model(inputs)) - exact).mean()
    assert errors["sorted"] < 0.5 * errors["cut"]
    assert errors["sorted"] < 0.2 * errors["whole"]


def test_gradients_pass_through_parts():
    inputs = tf.Variable(np.random.default_rng(0).normal(0, 1, (2, 8)).astype(np.float32))
    factors = tf.constant(np.arange(16, dtype=np.float32).reshape(2, 8))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(fake_quantize_rows(inputs, (1,), 2) * factors)
    np.testing.assert_array_equal(tape.gradient(total, inputs), factors)


def test_bad_input_changes_nothing():
    model = make_gpt()
    weights = model.get_weights()
    for settings, message in (
        ({"activation_blocks": 0}, "int >= 1. Received: activation_blocks=0"),
        ({"activation_blocks": 2, "activations": None}, "rounds none"),
    ):
        with pytest.raises(ValueError, match=message):
            Int8(**settings)
    data, _ = random_batch()
    for spec, message in (
        (Int8(activation_blocks=3), r"has 32. Received.*\[1, 2, 4, 8, 16, 32\] do for all"),
        (Int4(activation_blocks=32), r"whole blocks of 2.*\[1, 2, 4, 8, 16\]"),
        (Int4(block_size=32, activation_blocks=2), r"whole blocks of 32.*\[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tfgptopt.quantize(model, spec, "sorting", data)
    with pytest.raises(ValueError, match="differ only in `activation_blocks`"):
        choices = (Int4(), Int8(activation_blocks=2), Int8())
        tfgptopt.quantization.allocate(model, data, 6.0, choices, by="kl")
    with pytest.raises(ValueError, match="needs calibration data"):
        tfgptopt.quantize(model, Int8(), "sorting")
    with pytest.raises(ValueError, match="no layout of Sequential"):
        sort_neurons(keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)]), np.ones((2, 4)))
    mixture = keras_hub.models.MixtralBackbone(211, 1, 4, 32, 48, 2, num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="mixture of experts"):
        sort_neurons(mixture, windows())
    for ours, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(ours, before)
    first, second = model.backbone.transformer_layers
    layer = second._feedforward_output_dense
    object.__setattr__(first, "_feedforward_output_dense", layer)
    with pytest.raises(ValueError, match="several places"):
        sort_neurons(model, data)
    pruned = make_gpt()
    tfgptopt.prune(pruned, 0.5, targets="feedforward_output")
    with pytest.raises(ValueError, match="prune after sorting"):
        sort_neurons(pruned, data)
    tfgptopt.finalize(pruned)
    tfgptopt.quantize_aware(pruned, Int8(), "feedforward_output")
    with pytest.raises(ValueError, match="rounded already"):
        sort_neurons(pruned, data)
