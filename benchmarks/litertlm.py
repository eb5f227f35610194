"""A bundle in LiteRT-LM and in this package's own runtime, in turns.

Both read the same prompts and decode behind them, warm, in fresh processes that take turns. Weights
are random, int8; the tokens are letters in pairs, so that both get the same.

    pip install litert-lm-api litert-lm-builder
    python benchmarks/litertlm.py             # shapes of GPT-2 small and SmolLM2-135M
    python benchmarks/litertlm.py --profile   # where the time of SmolLM2's shape goes, one thread
    python benchmarks/litertlm.py --quick     # a few layers, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import string
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEPTHS, DECODED, RUNS = (128, 512), 32, 3
PAIRS = [upper + lower for upper in string.ascii_uppercase for lower in string.ascii_lowercase]
TEXT = [PAIRS[i * 7919 % len(PAIRS)] for i in range(max(DEPTHS))]


def median_times(run: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Returns the median times of reading and of decoding, after a run that is not counted."""
    found = [run() for _ in range(RUNS + 1)][1:]
    read, decoded = (statistics.median(times) for times in zip(*found, strict=True))
    return read, decoded


def rates(depth: int, read: float, decoded: float) -> dict[str, float]:
    """Returns tokens a second."""
    return {f"prefill {depth}": (depth - 1) / read, f"decode {depth}": DECODED / decoded}


def ours(path: str, threads: int) -> dict[str, float]:
    """This package's runtime."""
    from tfgptopt.generation import TFLiteCausalLM

    lm = TFLiteCausalLM(path, threads)
    cache, found = lm._engine.new_cache(), {}
    for depth in DEPTHS:
        tokens = lm.tokenize("".join(TEXT[:depth]))

        def run(tokens: list[int] = tokens) -> tuple[float, float]:
            cache.tokens.clear()
            start = time.perf_counter()
            lm._engine.read(cache, tokens[:-1])
            middle, token = time.perf_counter(), tokens[-1]
            for _ in range(DECODED):
                token = int(lm._engine.decode(cache, token).argmax())
            return middle - start, time.perf_counter() - middle

        found |= rates(len(tokens), *median_times(run))
    return found


def engine(path: str, threads: int) -> dict[str, float]:
    """LiteRT-LM."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    model = litert_lm.Engine(path, litert_lm.Backend.CPU(thread_count=threads))
    found = {}
    for depth in DEPTHS:

        def run(depth: int = depth) -> tuple[float, float]:
            session = model.create_session(apply_prompt_template=False, max_output_tokens=DECODED)
            start = time.perf_counter()
            session.run_prefill(["".join(TEXT[:depth])])
            middle = time.perf_counter()
            session.run_decode()
            return middle - start, time.perf_counter() - middle

        found |= rates(depth, *median_times(run))
    return found


def cpu_ms(step: Callable[[], int]) -> float:
    """Returns milliseconds of CPU for a token, by a function that says how many it decoded."""
    found = []
    for _ in range(RUNS + 3):
        start = time.process_time()
        count = step()
        found.append((time.process_time() - start) / count * 1e3)
    return statistics.median(found[1:])


def ours_cpu(path: str, threads: int, whole: bool = False) -> dict[str, float]:
    """What a token costs here, behind 128 others; with `whole` on a cache of the whole context."""
    from tfgptopt.generation import TFLiteCausalLM

    lm = TFLiteCausalLM(path, threads)
    cache, tokens = lm._engine.new_cache(), lm.tokenize("".join(TEXT[:128]))
    text = (tokens * 8)[: lm.metadata.decoder.context_length] if whole else tokens
    lm._engine.read(cache, text)

    def step() -> int:
        cache.tokens[:] = tokens[:-1]
        token = tokens[-1]
        for _ in range(DECODED):
            token = int(lm._engine.decode(cache, token).argmax())
        return DECODED

    return {"ms": cpu_ms(step)}


def ours_whole_cpu(path: str, threads: int) -> dict[str, float]:
    """The same on a cache of the whole context."""
    return ours_cpu(path, threads, whole=True)


def engine_cpu(path: str, threads: int) -> dict[str, float]:
    """What a token costs in LiteRT-LM, behind 128 others: the difference of long and short."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
    model = litert_lm.Engine(path, litert_lm.Backend.CPU(thread_count=threads))

    def seconds(new: int) -> float:
        session = model.create_session(apply_prompt_template=False, max_output_tokens=new)
        session.run_prefill(["".join(TEXT[:128])])
        start = time.process_time()
        session.run_decode()
        return time.process_time() - start

    seconds(DECODED)
    found = [(seconds(DECODED) - seconds(1)) / (DECODED - 1) for _ in range(RUNS + 3)]
    return {"ms": statistics.median(found) * 1e3}


WORKERS = {f.__name__: f for f in (ours, engine, ours_cpu, ours_whole_cpu, engine_cpu)}
# Who reads which bundle: one with caches of the whole context, or one whose caches grow.
CONTENDERS = {"ours": ("ours", "whole"), "whole": ("engine", "whole"), "grows": ("engine", "grows")}


def export(name: str, layers: int | None, folder: Path, context: int = 1024) -> None:
    """Writes the bundles, and a file to compare their size with; prints it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras_hub

    import tfgptopt
    from tfgptopt.exporting import LiteRTLM
    from tfgptopt.quantization import Int8

    models = keras_hub.models
    if name == "GPT-2 small":
        backbone = models.GPT2Backbone(
            50257, layers or 12, 12, 768, 3072, max_sequence_length=context
        )
        model = models.GPT2CausalLM(backbone, preprocessor=None)
    else:
        backbone = models.Llama3Backbone(
            49152, layers or 30, 9, 576, 1536, 3, tie_word_embeddings=True
        )
        model = models.Llama3CausalLM(backbone, preprocessor=None)
    tokens = ["!", *string.ascii_letters, *PAIRS]
    tokens += [f"<{i}>" for i in range(backbone.vocabulary_size - len(tokens))]
    tokenizer = keras_hub.tokenizers.BytePairTokenizer(
        {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in PAIRS]
    )
    tokenizer.end_token_id = 0
    model.preprocessor = types.SimpleNamespace(tokenizer=tokenizer, sequence_length=context)
    tfgptopt.quantize_aware(model, Int8())
    start = time.perf_counter()
    bundle = tfgptopt.export(model, folder / "whole.litertlm")
    took = time.perf_counter() - start
    tfgptopt.export(model, folder / "grows.litertlm", LiteRTLM(growing_cache=True))
    file = tfgptopt.export(model, folder / "gpt.tflite")
    sizes = [path.stat().st_size / 1e6 for path in (file, bundle)]
    print(
        f"{name}: .tflite {sizes[0]:.2f} MB, .litertlm {sizes[1]:.2f} MB, exported in {took:.1f} s"
    )


def measure(folder: Path, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Returns tokens a second of each, medians over processes that take turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    environment = {**os.environ, "TFGPTOPT_WEIGHT_CACHE": str(folder / "cache")}
    for _ in range(rounds):
        for name, (worker, bundle) in CONTENDERS.items():
            path = str(folder / f"{bundle}.litertlm")
            command = [sys.executable, __file__, "--worker", worker, path, str(threads)]
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            if result.returncode:
                raise RuntimeError(f"{name}: {result.stderr[-800:]}")
            runs[name].append(json.loads(result.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }


def show(results: dict[str, dict[str, float]]) -> None:
    """Prints a row for each figure: tokens a second, and LiteRT-LM's share of ours."""
    for key, mine in results["ours"].items():
        others = [results[name][key] for name in ("whole", "grows")]
        words = "  ".join(f"{rate:7.1f} {rate / mine:5.2f}" for rate in others)
        print(f"  {key:12} ours {mine:7.1f}  LiteRT-LM, whole and growing cache: {words}")


def profile(rounds: int) -> None:
    """Prints what a token costs, apart for what each layer takes and what all takes once."""
    workers = ("ours_cpu", "ours_whole_cpu", "engine_cpu")
    for context in (256, 1024):
        found: dict[tuple[str, int], list[float]] = {}
        for layers in (2, 30):
            with tempfile.TemporaryDirectory() as folder:
                export("SmolLM2", layers, Path(folder), context)
                for _ in range(rounds):
                    for worker in workers:
                        command = [sys.executable, __file__, "--worker", worker]
                        command += [str(Path(folder) / "whole.litertlm"), "1"]
                        result = subprocess.run(command, capture_output=True, text=True, check=True)
                        ms = json.loads(result.stdout.splitlines()[-1])["ms"]
                        found.setdefault((worker, layers), []).append(ms)
        for worker in workers:
            few, all_ = (statistics.median(found[worker, layers]) for layers in (2, 30))
            layer = (all_ - few) / 28
            print(
                f"context {context}, {worker}: {all_:.2f} ms, {layer:.3f} a layer, "
                f"{few - 2 * layer:.2f} besides"
            )


def main() -> None:
    """Writes the bundles, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    if arguments.worker:
        name, path, threads = arguments.worker
        print(json.dumps(WORKERS[name](path, int(threads))))
        return
    if arguments.profile:
        profile(arguments.rounds)
        return
    for name in ("GPT-2 small", "SmolLM2"):
        with tempfile.TemporaryDirectory() as folder:
            export(name, 2 if arguments.quick else None, Path(folder))
            show(
                measure(Path(folder), 1 if arguments.quick else arguments.rounds, arguments.threads)
            )


if __name__ == "__main__":
    main()
