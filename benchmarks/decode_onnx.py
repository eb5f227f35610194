"""Writes the prefill of a GPT-2 as ONNX with dynamic int8, the usual way to run it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from tfgptopt.decoder.spec import DecoderSpec, Matrix, Norm


class _Graph:
    """Nodes and constants of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"value_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def product(self, x: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """Adds a product with a matrix of shape `(outputs, inputs)`."""
        y = self.add("MatMul", x, self.constant(weight.T))
        return y if bias is None else self.add("Add", y, self.constant(bias))

    def norm(self, x: str, norm: Norm) -> str:
        assert norm.beta is not None
        parts = (self.constant(norm.gamma), self.constant(norm.beta))
        return self.add("LayerNormalization", x, *parts, epsilon=norm.epsilon)


def _attention(graph: _Graph, attention: Any, x: str, mask: str, length: int) -> str:
    parts: tuple[Matrix, ...] = (attention.query, attention.key, attention.value)
    biases = np.concatenate([part.bias for part in parts if part.bias is not None])
    both = graph.product(x, np.concatenate([part.values for part in parts]), biases)
    heads, size = attention.num_heads, attention.head_dim
    shape = graph.constant(np.asarray([length, heads, size]))
    by_head = [
        graph.add("Transpose", graph.add("Reshape", part, shape), perm=order)
        for part, order in zip(
            graph.add("Split", both, outputs=3, axis=1, num_outputs=3),
            ([1, 0, 2], [1, 2, 0], [1, 0, 2]),
            strict=True,
        )
    ]
    scale = graph.constant(np.float32(attention.scale))
    scores = graph.add("Mul", graph.add("MatMul", by_head[0], by_head[1]), scale)
    weights = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", weights, by_head[2]), perm=[1, 0, 2])
    flat = graph.add("Reshape", mixed, graph.constant(np.asarray([length, heads * size])))
    return graph.product(flat, attention.output.values, attention.output.bias)


def write_onnx(spec: DecoderSpec, path: Path, length: int) -> None:
    """Writes a graph that reads `length` tokens and gives the logits behind the last.

    Args:
        spec: A float32 GPT-2.
        path: The file of int8 weights.
        length: Tokens.
    """
    assert spec.position_embedding is not None
    graph = _Graph()
    mask = graph.constant(np.triu(np.full((length, length), -1e9, np.float32), 1))
    x = graph.add("Gather", graph.constant(spec.token_embedding.values), "tokens")
    x = graph.add("Add", x, graph.constant(spec.position_embedding[:length]))
    for block in spec.blocks:
        normed = graph.norm(x, block.attention_norm)
        x = graph.add("Add", x, _attention(graph, block.attention, normed, mask, length))
        up, down = block.feedforward.up, block.feedforward.down
        hidden = graph.product(graph.norm(x, block.feedforward_norm), up.values, up.bias)
        hidden = graph.add("Gelu", hidden, approximate="tanh")
        x = graph.add("Add", x, graph.product(hidden, down.values, down.bias))
    last = graph.add("Gather", x, graph.constant(np.asarray([length - 1])), axis=0)
    logits = graph.product(graph.norm(last, spec.final_norm), spec.token_embedding.values)
    inputs = [helper.make_tensor_value_info("tokens", onnx.TensorProto.INT64, [length])]
    outputs = [helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, None)]
    made = helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    floats = path.with_suffix(".f32.onnx")
    onnx.save(model, floats)
    quantize_dynamic(floats, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    floats.unlink()
