"""Is evaluation honest and cheap? A stopwatch beside its speeds, prefill beside its reading.

    python benchmarks/evaluation.py [layers width vocabulary]

Exports a GPT-2 (6 layers, width 384, vocabulary 8,192 unless given) in int8, and prints, by turns
in one process: tokens per second that `evaluate` reports divided by those of a stopwatch around
`generate`; and, in CPU time so that other work counts little, tokens per second of several ways to
score, divided by those that the file reads as a prompt.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import keras_hub
import numpy as np
import tensorflow as tf

import tfgptopt
from tfgptopt.evaluation import open_artifact
from tfgptopt.evaluation.quality import compare_quality
from tfgptopt.evaluation.speed import compare_speed
from tfgptopt.quantization import Int8

ROUNDS, NEW, LENGTH, ROWS = 7, 96, 256, 8


def seconds(call, clock=time.process_time) -> float:
    began = clock()
    call()
    return clock() - began


def main() -> None:
    layers, width, vocabulary = (int(x) for x in sys.argv[1:4] or (6, 384, 8192))
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary, layers, width // 64, width, 4 * width, max_sequence_length=512
    )
    gpt = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    tfgptopt.quantize(gpt, Int8())
    tokens = np.random.default_rng(0).integers(0, vocabulary, (ROWS, LENGTH + 1), np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, :-1])}
    ones = np.ones((ROWS, LENGTH), np.float32)
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:], ones)).batch(4)
    with tempfile.TemporaryDirectory() as folder:
        path = tfgptopt.export(gpt, Path(folder) / "gpt.tflite")
        lm, other = tfgptopt.TFLiteCausalLM(path), tfgptopt.TFLiteCausalLM(path)
        artifact, prompt = {"file": open_artifact(lm)}, tokens[0, :16].tolist()
        both = {**artifact, "other": open_artifact(other)}
        cache = lm._engine.new_cache()

        def generate() -> None:
            lm.reset()
            lm.generate(prompt, max_length=16 + NEW, stop=None)

        def read() -> None:
            for row in tokens:
                cache.tokens.clear()
                lm._engine.read(cache, row[:-1].tolist())

        def run() -> None:
            for row in tokens:
                for _ in lm._engine.score_parts(cache, row[:-1].tolist()):
                    pass

        def sliding() -> None:  # Half of each window is context.
            for row in tokens:
                for _ in lm._engine.score_parts(cache, row[:-1].tolist(), LENGTH // 2):
                    pass

        ways = {
            "the signatures that score, their logits copied out": run,
            "`lm.score`": lambda: [lm.score(row.tolist()) for row in tokens],
            "evaluation: loss, ranks, intervals": lambda: compare_quality(artifact, data),
            "evaluation of two, with KL, each": lambda: compare_quality(both, data, "file"),
            "the second half of each window scored": sliding,
        }
        for call in (generate, read, *ways.values()):
            call()
        stopwatch: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            clock = time.perf_counter
            watch = NEW / statistics.median(seconds(generate, clock) for _ in range(5))
            own = compare_speed(artifact, prompt, NEW, 5)["file"].tokens_per_second
            stopwatch.append(own / watch)
            for name, call in ways.items():
                prefill = seconds(read) * (2 if "two" in name else 1)
                ratios[name].append(prefill / seconds(call))
    show("tokens per second, of a stopwatch's", stopwatch)
    body = 12 * layers * width**2
    print(f"head computed at the rate of the layers: {body / (body + vocabulary * width):.2f}")
    for name, values in ratios.items():
        show(name, values)


def show(name: str, values: list[float]) -> None:
    print(f"{name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
