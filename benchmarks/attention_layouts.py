"""How fast LiteRT multiplies one token's queries, or weights, with the KV cache.

Each row is a graph of its own that reads one cache of every layer, in turns with the others. The
first one copies as many positions out of a longer cache.

    python benchmarks/attention_layouts.py                          # GPT-2 small
    python benchmarks/attention_layouts.py --heads 9 --layers 30    # three heads on each key
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Options
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from rich.console import Console
from rich.table import Table

from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Graph, Model, Tensor
from tfgptopt.terminal.quiet import quiet_native_logs

CONTEXT, SIZE, ROUNDS = 1024, 64, 15
COPY = "copy out of a longer cache"


def forms(groups: int, shared: int, positions: int) -> dict[str, Callable[[Graph, Tensor], Tensor]]:
    """Returns ways to read a cache `(groups, positions, 64)`, or with the last axes exchanged."""
    draw = np.random.default_rng(0).normal
    query = draw(0, 1, (groups, shared, SIZE)).astype(np.float32)
    weights = draw(0, 1, (groups, shared, positions)).astype(np.float32)

    def product(graph: Graph, cache: Tensor, values: np.ndarray, axis: int) -> Tensor:
        """Products and a sum over an axis, by broadcasting."""
        factor = values[..., None] if axis == 2 else values[:, :, None]
        if shared == 1:  # A reshape would copy the cache.
            factor, axis = factor[:, 0], axis - 1
        else:
            cache = op.reshape(graph, cache, (groups, 1, *cache.shape[1:]))
        products = op.binary(graph, "MUL", cache, graph.constant(factor))
        return op.reduce(graph, "SUM", products, axis, keep=False)

    def right(graph: Graph, cache: Tensor, values: np.ndarray, turned: bool) -> Tensor:
        return op.batch_matmul(graph, graph.constant(values), cache, turned)

    def left(graph: Graph, cache: Tensor, values: np.ndarray) -> Tensor:
        return op.batch_matmul(graph, cache, graph.constant(values), True)

    return {
        COPY: lambda g, c: op.slice_(g, c, (0, 0, 0), (groups, positions, SIZE)),
        "keys: MUL, SUM": lambda g, c: product(g, c, query, 3),
        "keys: BATCH_MATMUL, right": lambda g, c: right(g, c, query, True),
        "keys: BATCH_MATMUL, left": lambda g, c: left(g, c, query),
        "keys transposed: MUL, SUM": lambda g, c: product(g, c, query, 2),
        "keys transposed: BATCH_MATMUL, right": lambda g, c: right(g, c, query, False),
        "values: MUL, SUM": lambda g, c: product(g, c, weights, 2),
        "values: BATCH_MATMUL, right": lambda g, c: right(g, c, weights, False),
        "values transposed: MUL, SUM": lambda g, c: product(g, c, weights, 3),
        "values transposed: BATCH_MATMUL, right": lambda g, c: right(g, c, weights, True),
    }


def compiled(form: Callable[[Graph, Tensor], Tensor], shape: Any, layers: int) -> Callable[[], Any]:
    """Returns a call of a graph that reads a cache for each layer; only sums leave it."""
    model = Model("attention")
    graph = model.graph("run")
    for i in range(layers):
        result = form(graph, graph.input(f"cache_{i}", shape, np.float32))
        flat = op.reshape(graph, result, (int(np.prod(result.shape[:-1])), result.shape[-1]))
        part = op.slice_(graph, flat, (0, 0), (1, flat.shape[1]))
        graph.output(f"part_{i}", op.binary(graph, "MUL", part, op.scalar(graph, 2.0)))
    with tempfile.TemporaryDirectory() as folder, quiet_native_logs():
        path = Path(folder) / "attention.tflite"
        path.write_bytes(model.pack())
        cpu = CpuOptions(num_threads=2, xnnpack_weight_cache_path=":memory")
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
        runner = CompiledModel.from_file(str(path), options=options)
        names = [f"cache_{i}" for i in range(layers)]
        inputs = {n: runner.create_input_buffer_by_name("run", n) for n in names}
        for buffer in inputs.values():
            buffer.write(np.random.default_rng(1).normal(0, 1, shape).astype(np.float32))
        names = [f"part_{i}" for i in range(layers)]
        outputs = {n: runner.create_output_buffer_by_name("run", n) for n in names}
    return lambda: runner.run_by_name("run", inputs, outputs)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--groups", type=int, help="key-value heads; default: 12 or a third")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--positions", type=int, default=640)
    arguments = parser.parse_args()
    heads = arguments.heads
    groups = arguments.groups or (heads if heads == 12 else heads // 3)
    calls = {}
    for name, form in forms(groups, heads // groups, arguments.positions).items():
        size = CONTEXT if name == COPY else arguments.positions
        inner = (SIZE, size) if "transposed" in name else (size, SIZE)
        calls[name] = compiled(form, (groups, *inner), arguments.layers)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(4):
                call()
            times[name].append((time.perf_counter() - start) / 4 * 1e3)
    table = Table(f"{heads} heads on {groups}, {arguments.positions} positions", "ms")
    for name, found in times.items():
        table.add_row(name, f"{statistics.median(found):.2f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
