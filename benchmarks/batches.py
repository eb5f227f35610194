"""Texts that are decoded together, beams, and processes, against one text after the other.

    python benchmarks/batches.py                     # GPT-2 small, random weights, int8
    python benchmarks/batches.py --model smollm2     # SmolLM2-135M: grouped queries
    python benchmarks/batches.py --quick             # a few layers, to see that it runs

All ways read the same prompts, by turns, in each of several fresh processes; the table has medians.
Workers are compared with one process of one thread, on two cores. Memory is what the two processes
hold of the packed weights: `Pss` counts what both share by half to each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tfgptopt.generation import Beam, TFLiteCausalLM

_PROMPT, _NEW = 32, 64


def write(folder: Path, model: str, quick: bool) -> Path:
    """Writes the file with batches."""
    from decode_files import make_gpt2
    from smollm2_files import make_smollm2

    import tfgptopt
    from tfgptopt.exporting import TFLite
    from tfgptopt.quantization import Int8

    gpt = make_smollm2() if model == "smollm2" else make_gpt2(quick)
    tfgptopt.quantize(gpt, Int8())
    return tfgptopt.export(gpt, folder / "gpt.tflite", TFLite(1024, batch_sizes=(4, 8)))


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def worker(path: Path, rounds: int) -> dict[str, float]:
    """Returns ratios that one process measured, by turns."""
    cache = path.parent / "packed"
    lm = TFLiteCausalLM(path, weight_cache=cache)
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, lm.vocabulary_size, (8, _PROMPT)).tolist()
    length = _PROMPT + _NEW

    def alone(count: int) -> None:
        for prompt in prompts[:count]:
            lm.generate(prompt, length, stop=None)

    found: dict[str, list[float]] = {"batch of 8": [], "batch of 4": [], "beam 4 / greedy": []}
    for _ in range(rounds):
        for count in (8, 4):
            one, together = seconds(lambda n=count: alone(n)), seconds(
                lambda n=count: lm.generate(prompts[:n], length, stop=None)
            )  # fmt: skip
            found[f"batch of {count}"].append(one / together)
        greedy = seconds(lambda: alone(1))
        beam = seconds(lambda: lm.generate(prompts[0], length, Beam(4), stop=None))
        found["beam 4 / greedy"].append(beam / greedy)
    return {name: statistics.median(values) for name, values in found.items()}


def two_workers(path: Path, count: int) -> dict[str, float]:
    """Returns how much faster two processes are than one thread, and what they hold."""
    cache = path.parent / "packed"
    lm = TFLiteCausalLM(path, num_threads=1, weight_cache=cache)
    both = TFLiteCausalLM(path, num_threads=2, weight_cache=cache)
    generator = np.random.default_rng(1)
    prompts = generator.integers(0, lm.vocabulary_size, (count, _PROMPT)).tolist()
    settings: dict[str, Any] = {"max_length": _PROMPT + _NEW, "stop": None}
    one = seconds(lambda: [lm.generate(prompt, **settings) for prompt in prompts])
    two = seconds(lambda: both.generate(prompts, num_workers=2, **settings))
    plain = seconds(lambda: both.generate(prompts, **settings))
    return {
        "2 workers / 1 thread alone": one / two,
        "2 workers / 2 threads in batches": plain / two,
    }


def memory(path: Path) -> dict[str, float]:
    """Returns MB that one and two processes hold together, each having generated."""
    code = (
        "import sys\nfrom tfgptopt.generation import TFLiteCausalLM\n"
        "lm = TFLiteCausalLM(sys.argv[1], 1, weight_cache=sys.argv[2])\n"
        "lm.generate([1, 2, 3], 16, stop=None)\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(path), str(path.parent / "packed")]
    held: dict[str, float] = {}
    processes: list[subprocess.Popen[str]] = []
    try:
        for name in ("MB of 1 process", "MB of 2 processes"):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(process)
            assert process.stdout is not None
            while process.stdout.readline().strip() != "ready":
                pass
            total = 0
            for one in processes:
                text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
                total += int(text.split("Pss:")[1].split()[0])
            held[name] = total * 1024 / 1e6
    finally:
        for process in processes:
            process.kill()
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gpt2", "smollm2"), default="gpt2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--worker", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), arguments.model, arguments.quick)
        command = [sys.executable, __file__, "--worker", str(path)]
        command += ["--rounds", str(arguments.rounds)]
        runs = []
        for _ in range(1 if arguments.quick else arguments.processes):
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(result.stdout.splitlines()[-1]))
        found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        found |= two_workers(path, 4 if arguments.quick else arguments.prompts)
        found |= memory(path)
        found["file MB"] = path.stat().st_size / 1e6
    table = Table(title=f"{arguments.model}, int8, {_NEW} tokens behind {_PROMPT}")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:.2f}" if value < 10 else f"{value:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
