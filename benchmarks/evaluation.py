"""Is evaluation honest and cheap? A stopwatch beside its speeds, prefill beside its reading.

    python benchmarks/evaluation.py

Exports a GPT-2 of 6 layers, width 384, in int8, and prints, by turns in one process: tokens per
second that `evaluate` reports divided by those of a stopwatch around `generate`, and tokens per
second that it scores divided by those that the file reads as a prompt.
"""

from __future__ import annotations

import statistics
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

ROUNDS, NEW, LENGTH, VOCABULARY = 7, 96, 256, 8192


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    backbone = keras_hub.models.GPT2Backbone(VOCABULARY, 6, 6, 384, 1536, max_sequence_length=512)
    gpt = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    tfgptopt.quantize(gpt, Int8())
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (8, LENGTH + 1), np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, :-1])}
    ones = np.ones((8, LENGTH), np.float32)
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:], ones)).batch(4)
    with tempfile.TemporaryDirectory() as folder:
        lm = tfgptopt.TFLiteCausalLM(tfgptopt.export(gpt, Path(folder) / "gpt.tflite"))
        artifact, prompt = {"file": open_artifact(lm)}, tokens[0, :16].tolist()

        def generate() -> None:
            lm.reset()
            lm.generate(prompt, max_length=16 + NEW, stop=None)

        def read() -> None:
            cache = lm._engine.new_cache()
            for row in tokens:
                cache.tokens.clear()
                lm._engine.read(cache, row[:-1].tolist())

        def score() -> None:
            for row in tokens:
                lm.logits(row[:-1].tolist())

        generate(), read(), score()
        compare_quality(artifact, data)
        ratios: dict[str, list[float]] = {"speed": [], "signatures": [], "evaluation": []}
        for _ in range(ROUNDS):
            watch = NEW / statistics.median(seconds(generate) for _ in range(5))
            own = compare_speed(artifact, prompt, NEW, 5)["file"].tokens_per_second
            ratios["speed"].append(own / watch)
            prefill = seconds(read)
            ratios["signatures"].append(prefill / seconds(score))
            ratios["evaluation"].append(prefill / seconds(lambda: compare_quality(artifact, data)))
    names = {
        "speed": "tokens per second, of a stopwatch's",
        "signatures": "scoring signatures, of the prefill rate",
        "evaluation": "evaluation with KL, ranks and intervals, of the prefill rate",
    }
    for key, values in ratios.items():
        low, high = min(values), max(values)
        print(f"{names[key]}: {statistics.median(values):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
