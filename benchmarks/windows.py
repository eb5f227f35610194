"""What it brings that layers with a window hold its rows alone: Gemma 3 270M behind long texts.

    python benchmarks/windows.py

The shape of Gemma 3 270M with a smaller vocabulary and random weights, in int8: fifteen of its
eighteen layers see 512 positions. Two files of one model, with short caches and whole ones, take
turns in one process; the median over rounds, on one thread, in time of the process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
import numpy as np

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.exporting.tflite import described
from tfgptopt.quantization import Int8

VOCABULARY, WINDOW, NEW = 8192, 512, 32


def make() -> Any:
    """Returns the model, rounded."""
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=VOCABULARY, image_size=None, num_layers=18, num_query_heads=4,
        num_key_value_heads=1, hidden_dim=640, intermediate_dim=2048, head_dim=256,
        query_head_dim_normalize=True, use_query_key_norm=True, use_post_ffw_norm=True,
        use_post_attention_norm=True, use_sliding_window_attention=True,
        sliding_window_size=WINDOW, vision_encoder=None,
    )  # fmt: skip
    model = keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)
    return tfgptopt.quantize(model, Int8())


def measure(lm: Any, depth: int) -> tuple[float, float]:
    """Returns the time of a token behind a text, and of reading the text, in ms of the process."""
    prompt = np.random.default_rng(0).integers(1, VOCABULARY, depth).tolist()
    engine = lm._engine
    cache = engine.new_cache()
    begin = time.process_time()
    engine.read(cache, prompt)
    read = time.process_time() - begin
    engine.decode(cache, 1)
    begin = time.process_time()
    for token in range(1, 1 + NEW):
        engine.decode(cache, token)
    return 1000 * (time.process_time() - begin) / NEW, 1000 * read


def held(lm: Any, depth: int) -> float:
    """Returns the MB that the cache of a text has."""
    engine = lm._engine
    cache = engine.new_cache()
    engine.read(cache, [1] * depth)
    parts = engine._caches._parts
    return (
        sum(
            heads * size * dtype.itemsize * engine._caches._room(key, cache)
            for key, (heads, size, dtype) in parts.items()
        )
        / 1e6
    )


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[512, 2048, 4000, 8000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, settings = make(), TFLite(context_length=max(options.depths) + 64)
        short = tfgptopt.export(model, Path(folder) / "short.tflite", settings)
        with patch.object(described, "windowed_layers", lambda *arguments: ()):
            whole = tfgptopt.export(model, Path(folder) / "whole.tflite", settings)
        lms = [tfgptopt.TFLiteCausalLM(path, num_threads=1) for path in (short, whole)]
        print("depth    ms a token, whole    prompt s, whole    cache MB, whole")
        for depth in options.depths:
            found: list[list[tuple[float, float]]] = [[], []]
            for _ in range(options.rounds):
                for i, lm in enumerate(lms):
                    found[i].append(measure(lm, depth))
            medians = [
                [statistics.median(values) for values in zip(*each, strict=True)] for each in found
            ]
            (token, read), (whole_token, whole_read) = medians
            print(
                f"{depth:5} {token:10.1f} {whole_token:9.1f} {read / 1000:11.2f} "
                f"{whole_read / 1000:8.2f} {held(lms[0], depth):10.1f} {held(lms[1], depth):8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
