"""What the server adds to a token, and whether many clients at once get their own answers.

    pip install 'tfgptopt[server]' httpx
    python benchmarks/serving.py --file gpt.tflite     # a file with a tokenizer
    python benchmarks/serving.py                       # a GPT-2 small shape, random weights, int8

The same prompt is continued by the runtime in this process and by a server in a process of its own,
by turns. Then 200 clients ask at once while 64 texts may wait.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.console import Console

from tfgptopt.generation import TFLiteCausalLM

_NEW = 64


def write(folder: Path) -> Path:
    """Writes a GPT-2 small with random weights and a tokenizer of the standard library."""
    import keras_hub

    import tfgptopt
    from tfgptopt.data import load_corpus
    from tfgptopt.exporting import TFLite
    from tfgptopt.quantization import Int8

    corpus = load_corpus(vocabulary_size=8192, sequence_length=64, batch_size=8)
    backbone = keras_hub.models.GPT2Backbone(
        corpus.tokenizer.vocabulary_size(), 12, 12, 768, 3072, max_sequence_length=1024, dropout=0.0
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=1024)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor)
    tfgptopt.quantize(model, Int8())
    return tfgptopt.export(model, folder / "gpt.tflite", TFLite(1024, batch_sizes=(4, 8)))


def memory(pid: int) -> float:
    """Returns what a process has in memory, in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1e3


def gaps(pieces: Iterator[object]) -> tuple[float, float]:
    """Returns the time to the first piece and the median between two."""
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in pieces]
    between = [after - before for before, after in itertools.pairwise(times[1:])]
    return times[1] - times[0], statistics.median(between)


def streamed(client: httpx.Client, prompt: str) -> Iterator[str]:
    body = {"prompt": prompt, "max_tokens": _NEW, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield line


def overhead(client: httpx.Client, lm: TFLiteCausalLM, rounds: int) -> tuple[float, float]:
    """Returns what the server adds to the first token and to one more, in ms."""
    added = []
    for number in range(rounds):
        prompt = f"{number} import os\nimport sys\n"  # The server has read none that begins so.
        length = len(lm.tokenize(prompt)) + 1 + _NEW
        lm.reset()
        own = gaps(lm.stream(prompt, length, stop=None))
        served = gaps(streamed(client, prompt))
        added.append([1e3 * (b - a) for a, b in zip(own, served, strict=True)])
    first, token = (statistics.median(values) for values in zip(*added, strict=True))
    return first, token


async def crowd(address: str, count: int, expected: list[str]) -> dict[str, int]:
    """Lets many clients ask at once; returns how many were answered, refused or answered wrong."""
    found = {"answered": 0, "refused (429)": 0, "wrong": 0}
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:

        async def one(number: int) -> None:
            prompt = f"x{number % len(expected)} ="
            body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 429:
                found["refused (429)"] += 1
                return
            text = response.json()["choices"][0]["text"]
            found["answered" if text == expected[number % len(expected)] else "wrong"] += 1

        await asyncio.gather(*(one(number) for number in range(count)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.file or write(Path(folder))
        program = Path(sys.executable).with_name("tfgptopt")
        server = subprocess.Popen(
            [program, "serve", path, "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            address = re.findall(r"http://[^/]+", server.stdout.readline())[0]
            lm = TFLiteCausalLM(path)
            with httpx.Client(base_url=address, timeout=60) as client:
                list(streamed(client, "x"))
                first, token = overhead(client, lm, arguments.rounds)
                console.print(
                    f"added to the first token {first:.1f} ms, to one more {token:.2f} ms"
                )
                expected = []
                for number in range(16):
                    body = {"prompt": f"x{number} =", "max_tokens": 24, "temperature": 0}
                    answer = client.post("/v1/completions", json=body).json()
                    expected.append(answer["choices"][0]["text"])
            held = [memory(server.pid)]
            for _ in range(2):
                began = time.perf_counter()
                found = asyncio.run(crowd(address, arguments.clients, expected))
                held.append(memory(server.pid))
                took = time.perf_counter() - began
                console.print(f"{json.dumps(found)} in {took:.1f} s, server {held[-1]:.0f} MB")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
