"""Lists of families in documents and docstrings are those of the registry."""

from pathlib import Path

import pytest

import tfgptopt
from tfgptopt import decoder, families
from tfgptopt.exporting import TFLite

ROOT = Path(__file__).parents[2]
# What a family is called in prose, where that is not the name of its class.
PROSE = {
    "GPT2": "GPT-2",
    "GPTNeoX": "GPT-NeoX",
    "Phi3": "Phi-3",
    "Gemma3": "Gemma 1 to 4",
    "Gemma3n": "Gemma 3n",
    "Gemma4": "Gemma 1 to 4",
    "Gemma": "Gemma 1",
    "Llama3": "Llama",
    "Qwen": "Qwen 2",
    "Qwen3": "Qwen 2 and 3",
    "QwenMoe": "Qwen MoE",
    "Qwen3Moe": "Qwen 3 MoE",
    "GptOss": "GPT-OSS",
}


def _line(path, beginning):
    return next(x for x in (ROOT / path).read_text("utf-8").splitlines() if beginning in x)


def _listed(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    "text",
    [
        _line("README.md", "| TFLite with KV cache |"),
        decoder.read_decoder.__doc__,
        TFLite.__doc__,
    ],
    ids=["README", "read_decoder", "TFLite"],
)
def test_every_family_that_is_read_is_listed(text):
    for name in families.known_families():
        assert PROSE.get(name, name) in _listed(text), name


@pytest.mark.parametrize(
    "text",
    [
        _line("README.md", "| Shrinking |"),
        _line("docs/shrinking.md", "can be shrunk."),
        tfgptopt.shrink.__doc__,
    ],
    ids=["README", "docs", "shrink"],
)
def test_exactly_the_families_that_shrink_are_listed(text):
    shrunk = families.known_families(shrinks=True)
    for name in families.known_families():
        word = PROSE.get(name, name)
        if name in shrunk:
            assert word in _listed(text), name
        elif word not in (PROSE.get(other, other) for other in shrunk):
            assert word not in _listed(text), name
