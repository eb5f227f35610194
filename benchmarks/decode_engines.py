"""Workers of `decode.py`: one engine, one file, one fresh process, one line of JSON.

    python benchmarks/decode_engines.py ENGINE FILE THREADS

Every engine reads the same 128 tokens and decodes one by one behind 64 and 512 tokens. They import
only what they measure, so that the peak memory is theirs.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPT, DEPTHS, DECODED, RUNS = 128, (64, 512), 16, 5


def text(length: int) -> list[int]:
    """Returns the token ids that all engines read."""
    return [i * 7919 % 40000 for i in range(length)]


def median_ms(call: Callable[[], Any], runs: int) -> float:
    """Returns the median time of a call, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def peak_mb() -> float:
    """Returns the most memory that this process had (`ru_maxrss` would count its parent's too)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    line = next(x for x in status.read_text("utf-8").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def tflite(path: str, threads: int) -> dict[str, Any]:
    """This package."""
    from tfgptopt.generation import TFLiteCausalLM

    start = time.perf_counter()
    lm = TFLiteCausalLM(path, threads)
    engine = lm._engine
    cache = engine.new_cache()
    found: dict[str, Any] = {"load_s": time.perf_counter() - start}

    def read(tokens: list[int], and_decode: bool) -> None:
        cache.tokens.clear()
        engine.read(cache, tokens[:-1] if and_decode else tokens)
        if and_decode:
            engine.decode(cache, tokens[-1])

    for depth in DEPTHS:
        engine.read(cache, text(depth))
        steps = iter(range(DECODED + 1))
        found[f"decode_{depth}_ms"] = median_ms(
            lambda steps=steps: engine.decode(cache, next(steps)), DECODED
        )
    found["decode_peak_mb"] = peak_mb()
    found["prefill_ms"] = median_ms(lambda: read(text(PROMPT), False), RUNS)
    found["first_token_ms"] = median_ms(lambda: read(text(PROMPT), True), RUNS)
    return found


def llama(path: str, threads: int) -> dict[str, Any]:
    """llama.cpp, through its C interface."""
    import llama_cpp as c

    c.llama_backend_init()
    start = time.perf_counter()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    settings = c.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 1024, threads, threads
    context = c.llama_init_from_model(model, settings)
    found: dict[str, Any] = {"load_s": time.perf_counter() - start}

    def read(tokens: list[int]) -> None:
        array = (c.llama_token * len(tokens))(*tokens)  # Must live as long as the batch.
        assert c.llama_decode(context, c.llama_batch_get_one(array, len(tokens))) == 0
        c.llama_get_logits_ith(context, -1)

    def afresh(tokens: list[int]) -> None:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        read(tokens)

    for depth in DEPTHS:
        afresh(text(depth))
        found[f"decode_{depth}_ms"] = median_ms(lambda: read([1]), DECODED)
    found["decode_peak_mb"] = peak_mb()
    found["prefill_ms"] = median_ms(lambda: afresh(text(PROMPT)), RUNS)
    found["first_token_ms"] = found["prefill_ms"]
    return found


def llama_logits(path: str, tokens: list[int], vocabulary: int) -> Any:
    """Returns llama.cpp's logits behind some tokens."""
    import llama_cpp as c
    import numpy as np

    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    context = c.llama_init_from_model(model, c.llama_context_default_params())
    array = (c.llama_token * len(tokens))(*tokens)
    assert c.llama_decode(context, c.llama_batch_get_one(array, len(tokens))) == 0
    return np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (vocabulary,)).copy()


def onnx(path: str, threads: int) -> dict[str, Any]:
    """ONNX Runtime, reading a prompt (the graph has no cache)."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    found: dict[str, Any] = {"load_s": time.perf_counter() - start}
    inputs = {"tokens": np.asarray(text(PROMPT), np.int64)}
    found["prefill_ms"] = median_ms(lambda: session.run(None, inputs), RUNS)
    found["first_token_ms"] = found["prefill_ms"]
    return found


def bandwidth(path: str, threads: int) -> dict[str, Any]:
    """How fast memory is read: the best of several ways, with one thread and with all."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    parts = [np.ones(2**25, np.float32) for _ in range(threads)]
    targets = [np.empty_like(part) for part in parts]
    ways: dict[str, tuple[int, Callable[[int], object]]] = {
        "products": (1, lambda i: parts[i] @ parts[i]),
        "sums of integers": (1, lambda i: parts[i].view(np.int64).sum()),
        "copies": (2, lambda i: np.copyto(targets[i], parts[i])),  # Read, and written.
    }
    rates = []
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        for used in {1, threads}:
            for passes, way in ways.values():
                ms = median_ms(lambda way=way, used=used: list(pool.map(way, range(used))), 9)
                rates.append(passes * used * parts[0].nbytes / ms / 1e6)
    return {"gb_per_s": max(rates)}


ENGINES = {f.__name__: f for f in (tflite, llama, onnx, bandwidth)}

if __name__ == "__main__":
    print(json.dumps(ENGINES[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))
