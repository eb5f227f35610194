"""How fast an exported file loads, reads and decodes, and what memory that takes."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfgptopt.file.container import read_container
from tfgptopt.generation.runtime import TFLiteCausalLM

_RUNS = 5
_DECODED = 16


@dataclass(frozen=True)
class FileSpeed:
    """What one process measured of one file, as medians.

    Attributes:
        load_seconds: From the path to a model that can read.
        prefill_tokens_per_second: Speed of reading a prompt.
        decode_ms: Milliseconds a token, by the number of tokens before it.
        peak_rss_bytes: Most memory that the process had, all of Python included.
    """

    load_seconds: float
    prefill_tokens_per_second: float
    decode_ms: dict[int, float]
    peak_rss_bytes: int


def measure(
    path: str | Path,
    depths: Sequence[int] = (64, 512),
    prompt_length: int = 128,
    num_threads: int | None = None,
    weight_cache: bool | str | Path = True,
) -> FileSpeed:
    """Measures a file in this process, whose peak memory should be the file's alone.

    Args:
        path: The `.tflite` file.
        depths: Tokens before the decoded ones; those that the context cannot hold are left out.
        prompt_length: Tokens of the prompt, at most what the context holds.
        num_threads: As for `TFLiteCausalLM`, as is `weight_cache`.

    Returns:
        A `FileSpeed`.
    """
    start = time.perf_counter()
    lm = TFLiteCausalLM(path, num_threads, weight_cache)
    engine = lm._engine
    cache = engine.new_cache()
    loaded = time.perf_counter() - start
    text = [i * 7 % lm.vocabulary_size for i in range(lm.context_length)]
    prompt = text[: min(prompt_length, lm.context_length - 1)]
    reading = []
    for _ in range(_RUNS + 1):  # The first run makes buffers.
        cache.tokens.clear()
        start = time.perf_counter()
        engine.read(cache, prompt)
        reading.append(time.perf_counter() - start)
    decode_ms = {}
    for depth in depths:
        if depth + _DECODED + 1 > lm.context_length:
            continue
        engine.read(cache, text[:depth])
        engine.decode(cache, text[depth])
        steps = []
        for token in text[depth + 1 : depth + 1 + _DECODED]:
            start = time.perf_counter()
            engine.decode(cache, token).argmax()
            steps.append(time.perf_counter() - start)
        decode_ms[depth] = 1e3 * statistics.median(steps)
    return FileSpeed(
        load_seconds=loaded,
        prefill_tokens_per_second=len(prompt) / statistics.median(reading[1:]),
        decode_ms=decode_ms,
        peak_rss_bytes=_peak_rss_bytes(),
    )


def _peak_rss_bytes() -> int:
    """Returns the most memory of this process; on Linux, `ru_maxrss` counts its parent's too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text("utf-8").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_in_fresh_process(path: str | Path, num_threads: int | None = None) -> FileSpeed:
    """Measures a file in a process of its own; see `measure`.

    Raises:
        FileNotFoundError, ValueError: As `TFLiteCausalLM`.
        RuntimeError: If the process fails.
    """
    read_container(path)
    command = [sys.executable, "-m", __name__, str(path), *map(str, filter(None, [num_threads]))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"Measuring '{path}' failed: {result.stderr.strip()[-500:]}")
    found = json.loads(result.stdout)
    found["decode_ms"] = {int(depth): ms for depth, ms in found["decode_ms"].items()}
    return FileSpeed(**found)


if __name__ == "__main__":
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(dataclasses.asdict(measure(sys.argv[1], num_threads=threads))))
