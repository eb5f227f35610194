"""A SavedModel's size and speed beside KerasHub's own compiled `generate`.

python benchmarks/saved_model.py             # GPT-2 small, random weights
python benchmarks/saved_model.py --quick     # a few layers, to see that it runs
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from decode_files import make_gpt2

import tfgptopt
from tfgptopt.quantization import Int8

_PROMPT, _LENGTH = 16, 64


def size(folder: Path) -> float:
    """Returns the size of all files of a folder, in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    model = make_gpt2(arguments.quick)
    model.compile(sampler="greedy")
    vocabulary = model.backbone.vocabulary_size
    tokens = np.random.default_rng(0).integers(1, vocabulary, (1, _LENGTH)).astype(np.int32)
    mask = (np.arange(_LENGTH) < _PROMPT)[None]
    inputs = {"token_ids": tokens * mask, "padding_mask": mask}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        floats = tfgptopt.export(model, folder / "floats", verbose=0)
        tfgptopt.quantize(model, Int8(), verbose=0)
        began = time.perf_counter()
        integers = tfgptopt.export(model, folder / "integers", verbose=0)
        exported = time.perf_counter() - began
        print(f"float32 {size(floats):.0f} MB, int8 {size(integers):.0f} MB, "
              f"{size(integers) / size(floats):.3f}; export {exported:.1f} s")  # fmt: skip
        saved = tf.saved_model.load(str(integers))
        given = [tf.constant(inputs["token_ids"]), tf.constant(mask, tf.int32)]
        ways = {
            "KerasHub": lambda: model.generate(inputs, stop_token_ids=None),
            "SavedModel": lambda: saved.generate(*given)["token_ids"].numpy(),
        }
        texts = [np.asarray(run()["token_ids"] if name == "KerasHub" else run())
                 for name, run in ways.items()]  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, run in ways.items():
                times[name].append(seconds(run))
        middle = {name: statistics.median(values) for name, values in times.items()}
        gain = middle["KerasHub"] / middle["SavedModel"]
        print(f"{_LENGTH - _PROMPT} tokens: KerasHub {middle['KerasHub']:.2f} s, SavedModel "
              f"{middle['SavedModel']:.2f} s, {gain:.2f} times as fast; "
              f"same text: {np.array_equal(*texts)}")  # fmt: skip


if __name__ == "__main__":
    main()
