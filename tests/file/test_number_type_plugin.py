"""Number types from outside the package, from training to files of both formats."""

from dataclasses import dataclass
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from conftest import make_gpt

import tfgptopt
from tfgptopt.file import number_types
from tfgptopt.file.number_types import NumberType, register_number_type
from tfgptopt.model.targets import select
from tfgptopt.quantization import specs
from tfgptopt.quantization.rounding import Grid, fake_quantize
from tfgptopt.quantization.specs import deserialize_spec, register_spec, serialize_spec


@dataclass(frozen=True)
class Int6:
    """Six bits in a byte, which LiteRT takes for int8 with small integers."""

    scale: str = "absmax"
    activations: str | None = "dynamic"

    bits: ClassVar[int] = 6
    embedding_bits: ClassVar[int] = 8
    block_size: ClassVar[None] = None


@dataclass(frozen=True)
class Int2:
    """Two bits, four to a byte: -1, 0 and 1, by the package's own number type."""

    scale: str = "mse"
    activations: str | None = "dynamic"

    bits: ClassVar[int] = 2
    embedding_bits: ClassVar[int] = 8
    block_size: ClassVar[None] = None


@pytest.fixture(autouse=True)
def registered():
    register_number_type(NumberType("int6", 6, schema.TensorType.INT8))
    register_spec(Int6)
    register_spec(Int2)
    yield
    del number_types._by_bits[6], specs._by_name["int6"], specs._by_name["int2"]


def logits(model, tokens):
    mask = np.ones((1, len(tokens)), np.int32)
    return np.asarray(model({"token_ids": np.asarray([tokens]), "padding_mask": mask}))[0]


def read(path):
    """Returns a file, and the tensors of its first signature by name."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    return model, {t.name.decode(): t for t in model.subgraphs[0].tensors if t.name}


@pytest.mark.parametrize("spec", [Int6(), Int2(), Int6(activations=None)], ids=repr)
def test_from_training_to_files(spec, tmp_path):
    model = make_gpt(layers=1)
    tfgptopt.quantize_aware(model, spec)
    tokens = np.random.default_rng(0).integers(0, 300, 24).tolist()
    expected = logits(model, tokens)

    path = tfgptopt.export(model, tmp_path / "gpt.tflite")
    lm = tfgptopt.TFLiteCausalLM(path)
    found = lm._engine.score(lm._engine.new_cache(), tokens)
    assert np.abs(found - expected).max() < 0.02 * expected.std() + 0.02
    file, tensors = read(path)
    target = next(t for t in select(model, None) if "feedforward_intermediate" in t.path)
    number = number_types.number_type(spec.bits)
    tensor = tensors[target.path]
    assert tensor.type == number.tensor_type
    integers = number.unpack(np.asarray(file.buffers[tensor.buffer].data, np.uint8), tensor.shape)
    assert set(np.unique(integers)) <= set(range(-number.limit, number.limit + 1))

    saved = tf.saved_model.load(str(tfgptopt.export(model, tmp_path / "saved")))
    inputs = {
        "token_ids": np.asarray([tokens], np.int32),
        "padding_mask": np.ones((1, 24), np.int32),
    }
    served = saved.serve({name: tf.constant(x) for name, x in inputs.items()})
    np.testing.assert_allclose(np.asarray(served)[0], expected, atol=1e-5)

    tfgptopt.finalize(model)
    values = target.variable.value
    scale = np.asarray(tensor.quantization.scale)
    np.testing.assert_array_equal(integers.T.reshape(values.shape) * scale, values)


def test_a_model_of_another_kind_through_the_converter(tmp_path):
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    tfgptopt.quantize_aware(model, Int6())
    path = tfgptopt.export(model, tmp_path / "dense.tflite")
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    assert schema.TensorType.INT8 in {t.type for t in file.subgraphs[0].tensors}


def test_a_type_that_tflite_has_not_is_refused_there(tmp_path):
    del number_types._by_bits[6]
    register_number_type(NumberType("int6", 6))
    model = make_gpt(layers=1)
    tfgptopt.quantize_aware(model, Int6())
    with pytest.raises(ValueError, match="A TFLite file cannot hold integers of type int6"):
        tfgptopt.export(model, tmp_path / "gpt.tflite")
    assert list(tmp_path.iterdir()) == []


def test_a_spec_is_known_by_its_name():
    assert serialize_spec(Int6()) == {"name": "int6", "scale": "absmax", "activations": "dynamic"}
    assert deserialize_spec({"name": "int6", "scale": "mse"}) == Int6("mse")
    specs.check_spec(Int6())
    with pytest.raises(ValueError, match=r"Int8\(\) or Int4\(\) or Int6\(\)"):
        specs.check_spec(Int6)
    with pytest.raises(ValueError, match="is a frozen dataclass"):
        register_spec(int)
    with pytest.raises(ValueError, match="is named Int6 already"):
        register_spec(dataclass(frozen=True)(type("Int6", (Int6,), {})))
    with pytest.raises(ValueError, match="lacks bits, embedding_bits"):
        register_spec(dataclass(frozen=True)(type("Bare", (), {})))


def test_rounding_takes_any_number_of_bits_of_the_table():
    values = tf.constant(np.random.default_rng(0).normal(size=(8, 4)), tf.float32)
    rounded = fake_quantize(values, Grid(6, (0,)))
    assert len(np.unique(rounded[:, 0])) <= 63


def test_int2_in_blocks_needs_inputs_that_are_floats(tmp_path):
    class Blocks(Int2):
        block_size = 32

    register_spec(Blocks)
    try:
        for activations in ("dynamic", None):
            model = make_gpt(layers=1)
            tfgptopt.quantize_aware(model, Blocks(activations=activations))
            if activations:
                with pytest.raises(ValueError, match="LiteRT has no product of int2 in blocks"):
                    tfgptopt.export(model, tmp_path / "gpt.tflite")
                continue
            lm = tfgptopt.TFLiteCausalLM(tfgptopt.export(model, tmp_path / "gpt.tflite"))
            found = lm._engine.score(lm._engine.new_cache(), list(range(20)))
            np.testing.assert_allclose(found, logits(model, list(range(20))), atol=1e-4)
    finally:
        del specs._by_name["blocks"]
