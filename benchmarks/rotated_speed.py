"""What rotation, and `down` in parts, cost a file: decoding and prefill of SmolLM2-135M in int8.

    python benchmarks/rotated_speed.py                      # rotation, in turns with a plain file
    python benchmarks/rotated_speed.py --only "down in 4"   # other ways

One thread, and the time of the process, since other work may share the machine; the median over
rounds, in which files take turns in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from smollm2_files import make_smollm2

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.quantization import Int8, Rotate, rotate

# How features are turned, and in how many parts `down` is.
SETTINGS: dict[str, tuple[Rotate | None, int]] = {
    "plain": (None, 1),
    "without down": (Rotate(down=None), 1),
    "rotation": (Rotate(), 1),
    "down in 2": (None, 2),
    "down in 4": (None, 4),
}
DOWN = "feedforward_output"
DEPTH, TOKENS, PROMPT = 64, 48, 256


def cpu_ms(lm: Any, prompt: list[int], new: int) -> float:
    """Returns the processor time of generating so many tokens behind a prompt."""
    begin = time.process_time()
    lm.generate(prompt, max_length=len(prompt) + new, stop=None)
    return 1000 * (time.process_time() - begin)


def figures(lm: Any) -> tuple[float, float]:
    """Returns the time of a token, and of reading a prompt."""
    short, long = list(range(100, 100 + DEPTH)), list(range(100, 100 + PROMPT))
    decode = cpu_ms(lm, short, TOKENS + 1) - cpu_ms(lm, short, 1)
    return decode / TOKENS, cpu_ms(lm, long, 1)


def measure(paths: dict[str, Path], order: list[str], rounds: int) -> dict[str, list[float]]:
    """Returns the medians of files that take turns, loaded in an order."""
    loaded = {name: tfgptopt.TFLiteCausalLM(paths[name], num_threads=1) for name in order}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    for i in range(rounds + 1):
        for name in order if i % 2 else order[::-1]:
            found[name].append(figures(loaded[name]))
    return {
        name: [statistics.median(each) for each in zip(*rows[1:], strict=True)]
        for name, rows in found.items()
    }


def main() -> None:
    """Writes the files, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=["without down", "rotation"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name in ["plain", *arguments.only]:
            technique, parts = SETTINGS[name]
            model = make_smollm2()
            begin = time.process_time()
            if technique is not None:
                rotate(model, technique)
            seconds = time.process_time() - begin
            tfgptopt.quantize_aware(model, Int8(activation_blocks=parts), DOWN)
            tfgptopt.quantize_aware(model, Int8(), f"^(?!.*{DOWN})")
            paths[name] = tfgptopt.export(model, Path(folder) / f"{name}.tflite", TFLite(512))
            size = paths[name].stat().st_size / 1e6
            print(f"{name}: rotated in {seconds:.0f} s of CPU, {size:.1f} MB", flush=True)
        for name in arguments.only:
            # Which file is loaded first matters more than what is in it: both ways.
            for order in (["plain", name], [name, "plain"]):
                found = measure(paths, order, arguments.rounds)
                ratios = [mine / plain for mine, plain in zip(found[name], found["plain"],
                                                              strict=True)]  # fmt: skip
                print(
                    f"{order}: {found[name][0]:.2f} ms a token, {ratios[0]:.3f} of plain; "
                    f"{PROMPT} tokens read in {found[name][1]:.0f} ms, {ratios[1]:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
