"""What rotation costs a file: decoding and prefill of SmolLM2-135M in int8, in turns.

    python benchmarks/rotated_speed.py

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

SETTINGS = {"plain": None, "without down": Rotate(down=None), "rotation": Rotate(),
            "32 at a time": Rotate(down=32)}  # fmt: skip
DEPTH, TOKENS, PROMPT = 64, 48, 256


def cpu_ms(lm: Any, prompt: list[int], new: int) -> float:
    """Returns the processor time of generating so many tokens behind a prompt."""
    begin = time.process_time()
    lm.generate(prompt, max_length=len(prompt) + new, stop=None)
    return 1000 * (time.process_time() - begin)


def main() -> None:
    """Writes the files, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, technique in SETTINGS.items():
            model = make_smollm2()
            begin = time.process_time()
            if technique is not None:
                rotate(model, technique)
            seconds = time.process_time() - begin
            tfgptopt.quantize_aware(model, Int8())
            path = Path(folder) / f"{name}.tflite"
            files[name] = tfgptopt.TFLiteCausalLM(
                tfgptopt.export(model, path, TFLite(512)), num_threads=1
            )
            print(f"{name}: rotated in {seconds:.0f} s of CPU, {path.stat().st_size / 1e6:.1f} MB")
        decode: dict[str, list[float]] = {name: [] for name in files}
        prefill: dict[str, list[float]] = {name: [] for name in files}
        for i in range(arguments.rounds + 1):
            for name in list(files)[:: 1 if i % 2 else -1]:
                short, long = list(range(100, 100 + DEPTH)), list(range(100, 100 + PROMPT))
                read = cpu_ms(files[name], short, 1)
                decode[name].append((cpu_ms(files[name], short, TOKENS + 1) - read) / TOKENS)
                prefill[name].append(cpu_ms(files[name], long, 1))
        for name in files:
            ratios = [
                statistics.median(
                    mine / plain for mine, plain in zip(of[name][1:], of["plain"][1:], strict=True)
                )
                for of in (decode, prefill)
            ]
            print(
                f"{name}: {statistics.median(decode[name][1:]):.2f} ms a token "
                f"({ratios[0]:.3f} of plain), {PROMPT} tokens of a prompt in "
                f"{statistics.median(prefill[name][1:]):.0f} ms ({ratios[1]:.3f})"
            )


if __name__ == "__main__":
    main()
