"""How fast a model answers: time to the first token, and tokens per second after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import keras_hub
import numpy as np

from tfgptopt.generation import TFLiteCausalLM


@dataclass(frozen=True)
class Speed:
    """Medians of several runs.

    Attributes:
        first_token_ms: Time from the call to the first new token, in milliseconds.
        tokens_per_second: New tokens per second of one greedy generation, prompt included in the
            time.
    """

    first_token_ms: float
    tokens_per_second: float


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _keras_calls(
    model: keras_hub.models.CausalLM, prompt: list[int], new_tokens: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns generation of one and of many tokens with KerasHub's compiled `generate_step`."""

    def call(count: int) -> Callable[[], object]:
        length = len(prompt) + count
        token_ids = np.zeros((1, length), np.int32)
        token_ids[0, : len(prompt)] = prompt
        mask = np.arange(length)[np.newaxis] < len(prompt)
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        generate = model.make_generate_function()
        return lambda: np.asarray(generate(inputs, stop_token_ids=None)["token_ids"])

    return call(1), call(new_tokens)


def _tflite_calls(
    lm: TFLiteCausalLM, prompt: list[int], new_tokens: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    def call(count: int) -> Callable[[], object]:
        def timed() -> object:
            lm.reset()  # Else the prompt would not be read again.
            return lm.generate(prompt, max_length=len(prompt) + count, stop=None)

        return timed

    return call(1), call(new_tokens)


def compare_speed(
    models: Mapping[str, keras_hub.models.CausalLM | TFLiteCausalLM],
    prompt: list[int],
    new_tokens: int = 96,
    runs: int = 5,
) -> dict[str, Speed]:
    """Measures greedy generation of several models side by side.

    The models take turns within each run, so that a change of the machine's speed hits all.

    Args:
        models: Names to `keras_hub.models.CausalLM` or `TFLiteCausalLM`.
        prompt: Token ids.
        new_tokens: int. Tokens to generate. Defaults to `96`.
        runs: int. Measurements of each, after one that compiles. Defaults to `5`.

    Returns:
        Names to `Speed`.
    """
    samplers = {n: getattr(m, "sampler", None) for n, m in models.items()}
    calls = {}
    for name, model in models.items():
        if isinstance(model, TFLiteCausalLM):
            calls[name] = _tflite_calls(model, prompt, new_tokens)
            continue
        model.sampler = keras_hub.samplers.GreedySampler()
        model.generate_function = None
        calls[name] = _keras_calls(model, prompt, new_tokens)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for run in range(runs + 1):
        for name, (one, many) in calls.items():
            measured = (_seconds(one), _seconds(many))
            if run:  # The first run compiles.
                times[name].append(measured)
    for name, model in models.items():
        if isinstance(model, keras_hub.models.CausalLM):
            model.sampler, model.generate_function = samplers[name], None
    return {
        name: Speed(
            first_token_ms=1e3 * statistics.median(first for first, _ in measured),
            tokens_per_second=new_tokens / statistics.median(many for _, many in measured),
        )
        for name, measured in times.items()
    }
