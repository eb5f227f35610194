"""Models that a user may bring besides decoders: other precisions, encoders, their own classes."""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from conftest import make_gpt

import tfgptopt
from tfgptopt.quantization import Int4, Int8
from tfgptopt.quantization.integers import read_integers


def run_tflite(path, **inputs):
    interpreter = Interpreter(str(path))
    runner = interpreter.get_signature_runner()
    return next(iter(runner(**inputs).values()))


def dense_model(dtype):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 16), name="x")
    hidden = keras.layers.Dense(32, "relu", dtype=dtype)(inputs)
    hidden = keras.layers.MultiHeadAttention(2, 8, dtype=dtype)(hidden, hidden)
    return keras.Model(inputs, keras.layers.Dense(4, dtype=dtype)(hidden))


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_other_precisions_are_converted_in_float32_with_their_integers(dtype, tmp_path):
    model = dense_model(dtype)
    tfgptopt.quantize_aware(model, Int8())
    x = np.random.default_rng(0).normal(0, 1, (1, 8, 16)).astype(np.float32)
    expected = np.asarray(model(x), np.float32)
    policies = [layer.dtype_policy.name for layer in model._flatten_layers()]
    values = [np.asarray(v, np.float32) for v in model.variables]
    path = tfgptopt.export(model, tmp_path / "model.tflite")
    got = run_tflite(path, x=x)
    np.testing.assert_allclose(got, expected, atol=0.1 * np.abs(expected).max())
    interpreter = Interpreter(str(path))
    kinds = [d["dtype"] for d in interpreter.get_tensor_details() if "kernel" in d["name"]]
    assert kinds.count(np.int8) >= 6 or all(k == np.int8 for k in kinds)
    assert [layer.dtype_policy.name for layer in model._flatten_layers()] == policies
    for before, now in zip(values, model.variables, strict=True):
        np.testing.assert_array_equal(before, np.asarray(now, np.float32))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, inputs, unused=None):
        x = inputs["a"] + inputs["b"] if isinstance(inputs, dict) else inputs
        return self.dense(x)

    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("named", [False, True])
def test_a_class_of_ones_own_that_was_called(named, tmp_path):
    model, x = Subclassed(), np.ones((3, 6), np.float32)
    with pytest.raises(ValueError, match="not built"):
        tfgptopt.export(model, tmp_path / "model.tflite")
    inputs = {"a": x, "b": x} if named else x
    expected = np.asarray(model(inputs))
    folder = tfgptopt.export(model, tmp_path / "folder")
    served = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(served.serve(inputs), expected, atol=1e-6)
    path = tfgptopt.export(model, tmp_path / "model.tflite")
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    assert len(interpreter.get_input_details()) == (2 if named else 1)


def small_bart():
    backbone = keras_hub.models.BartBackbone(50, 1, 2, 16, 32, max_sequence_length=8)
    return keras_hub.models.BartSeq2SeqLM(backbone, preprocessor=None)


def test_an_encoder_and_decoder_are_a_model_like_any_other(tmp_path):
    model = small_bart()
    tokens, mask = np.ones((1, 8), np.int32), np.ones((1, 8), np.int32)
    inputs = {f"{part}_token_ids": tokens for part in ("encoder", "decoder")}
    inputs |= {f"{part}_padding_mask": mask for part in ("encoder", "decoder")}
    expected = np.asarray(model(inputs))
    folder = tfgptopt.export(model, tmp_path / "folder")
    served = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(served.serve(inputs), expected, atol=1e-5)


@pytest.mark.parametrize("what", ["kernel", "embeddings", "bias", "gamma"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(what, value, tmp_path):
    model = make_gpt()
    tfgptopt.quantize_aware(model, Int8())
    variable = next(v for v in model.variables if what in v.path)
    broken = variable.numpy()
    broken.reshape(-1)[3] = value
    variable.assign(broken)
    for call in (
        lambda: tfgptopt.export(model, tmp_path / "gpt.tflite"),
        lambda: tfgptopt.export(model, tmp_path / "folder"),
        lambda: tfgptopt.finalize(model),
    ):
        with pytest.raises(ValueError, match=f"NaN or infinite: {variable.path}"):
            call()
    assert not list(tmp_path.iterdir())
    plain = make_gpt()
    next(v for v in plain.variables if what in v.path).assign(broken)
    with pytest.raises(ValueError, match="NaN or infinite"):
        tfgptopt.quantize(plain, Int8())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_finalized_weights_of_16_bits_ship_the_integers_that_were_found(dtype, method, recwarn):
    keras.utils.set_random_seed(0)
    with_dtype = {"dtype": dtype}
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(48, **with_dtype),
            keras.layers.Dense(8, **with_dtype),
        ]
    )
    x = np.random.default_rng(0).normal(0, 1, (128, 64)).astype(np.float32)
    tfgptopt.quantize(model, Int4() if method == "gptq" else Int8(), method, x)
    before = [one for layer in model.layers for one in read_integers(layer)]
    tfgptopt.finalize(model)
    after = [one for layer in model.layers for one in read_integers(layer)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.integers, other.integers)
        np.testing.assert_array_equal(one.scale, other.scale)
    assert not [w for w in recwarn if "changed since" in str(w.message)]
    model.layers[0]._kernel.assign(model.layers[0]._kernel * 1.1)
    with pytest.warns(UserWarning, match="changed since `finalize`"):
        read_integers(model.layers[0])


def test_matrices_that_nothing_can_see_are_named(capsys):
    class Experts(keras.layers.Layer):
        def build(self, shape):
            self.weights_of_experts = self.add_weight((4, shape[-1], 8), name="experts")

        def call(self, x):
            return keras.ops.einsum("bi,eio->bo", x, self.weights_of_experts)

    model = keras.Sequential([keras.Input((6,)), Experts(), keras.layers.Dense(2)])
    tfgptopt.summary(model)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Experts with 4x6x8 is no" in printed
