"""Models that no reader describes: through TensorFlow's converter and Keras' own export."""

import warnings

import keras
import keras_hub
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from decoder.families import logits, of_own_class, prompt, randomize

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.quantization import Int4, Int8, rounding

CONTEXT = 24


def make_mixture():
    backbone = keras_hub.models.GptOssBackbone(
        vocabulary_size=101,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
        num_experts=4,
        top_k=2,
        head_dim=8,
        sliding_window=8,
    )
    model = of_own_class(keras_hub.models.GptOssCausalLM(backbone, preprocessor=None))
    randomize(model)
    return model


def tokens_of(length, seed=1):
    return [token % 101 for token in prompt(length, seed)]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, Int8()], ids=str)
def test_a_causal_lm_of_ones_own_class_has_the_same_interface(spec, tmp_path):
    model = make_mixture()
    if spec is not None:
        tfgptopt.quantize_aware(model, spec)
    before = [weight.numpy() for weight in model.weights]
    with pytest.warns(UserWarning, match="No reader describes OwnCausalLM"):
        path = tfgptopt.export(model, tmp_path / "moe.tflite", TFLite(context_length=CONTEXT))
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    lm = tfgptopt.TFLiteCausalLM(path)

    def difference(tokens):
        found = lm._engine.score(lm._engine.new_cache(), tokens)
        return np.abs(found - logits(model, tokens)).max()

    largest = [difference(tokens_of(CONTEXT, seed)) for seed in range(5)]
    if spec is not None:
        # The converter's products of experts do not round their inputs, as training does.
        assert np.median(largest) < 0.1
        return
    assert max(largest) < 1e-4
    expected = tokens_of(3)
    while len(expected) < CONTEXT:
        expected.append(int(logits(model, expected)[-1].argmax()))
    assert lm.generate(expected[:3], max_length=CONTEXT, stop=None) == expected


def test_a_cache_of_another_form_is_refused(tmp_path):
    class Own(keras_hub.models.GptOssCausalLM):
        def _build_cache(self, token_ids):
            return None, (1, 2)

    model = make_mixture()
    model.__class__ = Own
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match="Cannot export Own with a KV cache"),
    ):
        tfgptopt.export(model, tmp_path / "own.tflite", TFLite(context_length=CONTEXT))
    assert list(tmp_path.iterdir()) == []


def make_classifier():
    tokens = keras.Input((16,), dtype="int32")
    x = keras.layers.Embedding(50, 32)(tokens)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(2, 16)(x, x))
    x = keras.layers.Dense(256, activation="gelu")(x)
    return keras.Model(tokens, keras.layers.Dense(7)(x))


@pytest.mark.parametrize("spec", [None, Int8(), Int8(activation_blocks=4), Int4()], ids=str)
def test_any_keras_model_keeps_its_integers_and_computes_as_dressed(spec, tmp_path):
    model = make_classifier()
    randomize(model)
    plain = tfgptopt.export(model, tmp_path / "plain.tflite")
    if spec is not None:
        tfgptopt.quantize_aware(model, spec)
    before = [weight.numpy() for weight in model.weights]
    with warnings.catch_warnings(action="error", category=UserWarning):
        path = tfgptopt.export(model, tmp_path / "model.tflite")
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    tokens = np.random.default_rng(0).integers(0, 50, (1, 16), np.int32)
    interpreter = Interpreter(str(path))
    (inputs,) = interpreter.get_signature_runner("serving_default").get_input_details()
    run = interpreter.get_signature_runner("serving_default")
    (found,) = run(**{inputs: tokens}).values()
    np.testing.assert_allclose(found, model(tokens), atol=1e-4)
    if spec is None:
        return
    share = 0.6 if spec.activation_blocks == 1 else 0.8  # Parts are more tensors.
    assert path.stat().st_size < share * plain.stat().st_size
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    stored = [
        np.asarray(file.buffers[tensor.buffer].data, np.uint8).view(np.int8).reshape(tensor.shape)
        for tensor in file.subgraphs[0].tensors
        if tensor.type == schema.TensorType.INT8 and len(tensor.shape) == 2
    ]
    table = next(w for w in model.weights if w.path.endswith("embeddings"))
    integers, _ = rounding.quantize(table.value, rounding.Grid(8, (1,)))
    assert any(np.array_equal(values, integers) for values in stored)
    kernel = next(w for w in model.weights if w.shape == (256, 7))
    integers, _ = rounding.quantize(kernel.value, rounding.Grid(spec.bits, (0,)))
    for part in np.split(integers.numpy().T, spec.activation_blocks, axis=1):
        assert spec.bits < 8 or any(np.array_equal(values, part) for values in stored)


def test_weights_that_the_converter_changed_are_named(tmp_path, monkeypatch):
    from tfgptopt.exporting.tflite import constants

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    tfgptopt.quantize_aware(model, Int8())
    monkeypatch.setattr(constants, "_digest", lambda array: bytes(np.random.bytes(8)))
    with pytest.warns(UserWarning, match=r"1 of 1 quantized weights stay float32.*dense.*kernel"):
        tfgptopt.export(model, tmp_path / "model.tflite")


def test_bad_requests_leave_nothing_behind(tmp_path):
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match="of a causal LM only"):
        tfgptopt.export(make_classifier(), path, TFLite(context_length=8))

    class Undeclared(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Undeclared()
    model.build((None, 4))
    with pytest.raises(ValueError, match="no declared inputs"):
        tfgptopt.export(model, path)
    assert list(tmp_path.iterdir()) == []
