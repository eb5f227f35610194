import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from conftest import make_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

import tfgptopt
from tfgptopt.decoder.spec import Matrix
from tfgptopt.exporting import TFLite
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Model
from tfgptopt.pruning import Block
from tfgptopt.quantization import Int8


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 8), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_a_sparse_product_is_the_dense_one(outputs, blocks, rows, with_bias, seed):
    generator = np.random.default_rng(seed)
    kept = generator.uniform(size=(outputs, blocks)) < 0.3
    values = generator.normal(0, 1, (outputs, 4 * blocks)) * np.repeat(kept, 4, axis=1)
    bias = generator.normal(0, 1, outputs).astype(np.float32) if with_bias else None
    matrix = Matrix("w", values.astype(np.float32), bias=bias)
    file = Model("test", sparse=True)
    graph = file.graph("serve")
    x = graph.input("x", (rows, 4 * blocks), np.float32)
    graph.input("input_pos", (1,), np.int32)
    graph.output("y", op.fully_connected(graph, x, matrix))
    runner = Interpreter(model_content=bytes(file.pack())).get_signature_runner("serve")
    inputs = generator.normal(0, 1, (rows, 4 * blocks)).astype(np.float32)
    expected = inputs @ matrix.values.T + (0 if bias is None else bias)
    found = runner(x=inputs, input_pos=np.int32([7]))["y"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_sparse_file_is_smaller_and_generates_the_same(tmp_path):
    model = make_gpt()
    tfgptopt.prune(model, 0.8, Block(4, 1))
    dense = tfgptopt.export(model, tmp_path / "dense.tflite")
    sparse = tfgptopt.export(model, tmp_path / "sparse.tflite", TFLite(sparse=True))
    saved = dense.stat().st_size - sparse.stat().st_size
    kernels = sum(row.shape[0] * row.shape[1] for row in tfgptopt.pruning.report(model).rows)
    assert saved > 4 * kernels * 0.6
    one, other = tfgptopt.TFLiteCausalLM(dense), tfgptopt.TFLiteCausalLM(sparse)
    prompt = list(range(3, 12))
    assert one.generate(prompt, stop=None) == other.generate(prompt, stop=None)
    np.testing.assert_allclose(one.score(prompt), other.score(prompt), atol=1e-4)


def test_refused_where_nothing_can_be_left_out(tmp_path):
    model = make_gpt()
    for prepare in (lambda: None, lambda: tfgptopt.prune(model, 0.5)):
        prepare()
        with pytest.raises(ValueError, match=r"Prune with `Block\(4, 1\)`"):
            tfgptopt.export(model, tmp_path / "m.tflite", TFLite(sparse=True))
    model = make_gpt()
    tfgptopt.prune(model, 0.9, Block(4, 1))
    tfgptopt.quantize_aware(model, Int8())
    with pytest.raises(ValueError, match="no kernel for sparse integers"):
        tfgptopt.export(model, tmp_path / "m.tflite", TFLite(sparse=True))
    with pytest.raises(ValueError, match=r"TFLite ends with '\.tflite'"):
        tfgptopt.export(model, tmp_path / "folder", TFLite(sparse=True))
    assert not list(tmp_path.iterdir())
