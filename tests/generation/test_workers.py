"""Processes that share the prompts."""

import functools
import os
import time

import pytest
from decoder.families import CONTEXT, make, prompt

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.generation import NGram, TFLiteCausalLM
from tfgptopt.generation import workers as module
from tfgptopt.generation.workers import generate_in_processes


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tmp_path_factory.mktemp("workers") / "gpt.tflite"
    return TFLiteCausalLM(tfgptopt.export(make("GPT2"), path, TFLite(CONTEXT)))


def test_texts_come_in_order_and_are_the_same(lm):
    prompts = [prompt(1 + i, i) for i in range(9)]
    settings = {"max_length": 24, "stop": None,
                "speculative": NGram()}  # fmt: skip
    expected, alone = lm.generate(prompts, return_stats=True, **settings)
    found, counts = lm.generate(prompts, return_stats=True, num_workers=2, **settings)
    assert found == expected
    assert counts.tokens == alone.tokens and counts.seconds > 0
    assert lm.generate(prompts[0], num_workers=2, max_length=8) == lm.generate(
        prompts[0], max_length=8
    )
    with pytest.raises(ValueError, match="Prompt 1 of 2"):
        lm.generate([[1], [10**6]], num_workers=2)
    with pytest.raises(ValueError, match="num_workers"):
        lm.generate(prompts, num_workers=0)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    found = []
    start = module._start

    def watched(*arguments):
        found.append(start(*arguments))
        return found[-1]

    monkeypatch.setattr(module, "_start", watched)
    return found


def test_a_worker_that_dies_is_told_and_no_process_is_left(started):
    for create, error, message in (
        (functools.partial(os._exit, 9), RuntimeError, "exit code 9"),
        (functools.partial(open, "gpt-that-was-moved"), FileNotFoundError, "moved"),
    ):
        with pytest.raises(error, match=message):
            generate_in_processes(create, 2, [[1], [2], [3]], {}, 1)
    assert len(started) == 4 and not any(one.process.is_alive() for one in started)


def test_an_interrupt_ends_all_processes(started, monkeypatch):

    def interrupted(connections):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_in_processes(functools.partial(time.sleep, 60), 2, [[1], [2]], {}, 1)
    assert len(started) == 2 and not any(one.process.is_alive() for one in started)
