import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Model


def run(build, **inputs):
    """Builds a graph of the given inputs and runs it in LiteRT's interpreter."""
    model = Model("test")
    graph = model.graph("serve")
    tensors = {name: graph.input(name, x.shape, x.dtype) for name, x in inputs.items()}
    graph.output("y", build(graph, **tensors))
    return Interpreter(model_content=bytes(model.pack())).get_signature_runner("serve")(**inputs)[
        "y"
    ]


def test_operators_compute_what_numpy_does():
    generator = np.random.default_rng(0)
    x = generator.normal(0, 1, (2, 3, 4)).astype(np.float32)
    y = generator.normal(0, 1, (2, 3, 4)).astype(np.float32)
    cases = {
        "add": (lambda g, x, y: op.binary(g, "ADD", x, y), x + y),
        "sum": (lambda g, x, y: op.reduce(g, "SUM", x, -1, keep=False), x.sum(-1)),
        "mean": (lambda g, x, y: op.reduce(g, "MEAN", x, 1, keep=True), x.mean(1, keepdims=True)),
        "reshape": (lambda g, x, y: op.reshape(g, x, (6, 4)), x.reshape(6, 4)),
        "transpose": (lambda g, x, y: op.transpose(g, x, (2, 0, 1)), x.transpose(2, 0, 1)),
        "slice": (lambda g, x, y: op.slice_(g, x, (0, 1, 2), (2, 2, 2)), x[:, 1:3, 2:4]),
        "matmul": (lambda g, x, y: op.batch_matmul(g, x, y, True), x @ y.swapaxes(1, 2)),
        "softmax": (lambda g, x, y: op.softmax(g, x), np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
        "gelu": (
            lambda g, x, y: op.activate(g, x, "gelu_tanh"),
            0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        ),
    }
    for name, (build, expected) in cases.items():
        np.testing.assert_allclose(run(build, x=x, y=y), expected, atol=1e-5, err_msg=name)


def test_a_cache_is_written_at_a_position():
    cache, new = np.zeros((2, 5, 3), np.float32), np.ones((2, 1, 3), np.float32)
    position = np.asarray([3], np.int32)

    def build(graph, cache, new, position):
        return op.dynamic_update_slice(graph, cache, new, op.pad_vector(graph, position, 1, 1))

    written = run(build, cache=cache, new=new, position=position)
    assert (written[:, 3] == 1).all() and written.sum() == 6


def test_equal_constants_and_weights_are_stored_once():
    model = Model("test")
    values = np.ones((50, 1000), np.float32)
    for name in ("one", "two"):
        graph = model.graph(name)
        x = graph.input("x", (1, 1000), np.float32)
        table = graph.weight("table", values)
        weight = graph.constant(np.full((1, 1000), 2.0, np.float32))
        assert table.shape == (50, 1000)
        graph.output("y", op.binary(graph, "MUL", x, weight))
    assert 204_000 < len(model.pack()) < 210_000


def test_too_large_a_file_is_refused_with_the_size():
    model = Model("test")
    huge = np.broadcast_to(np.zeros(1, np.float32), (2**29,))
    model._buffers.append(type(model._buffers[0])(b""))
    model._buffers[-1].data = huge
    with pytest.raises(ValueError, match=r"2\.00 GiB.*Quantize"):
        model.pack()
