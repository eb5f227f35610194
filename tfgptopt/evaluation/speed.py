"""How fast a model answers: the first token, tokens after it, and how evenly they come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tfgptopt.evaluation.artifacts import Artifact, InBatches, open_artifact

# New tokens whose times the percentiles are of, at each depth.
_STEPS = 32
DEPTHS = (16, 64, 512)


@dataclass(frozen=True)
class Latency:
    """Milliseconds that new tokens took, behind so many others.

    Attributes:
        p50, p95, p99: Half, 95 % and 99 % of the tokens took no longer.
    """

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Speed:
    """Medians of several runs.

    Attributes:
        first_token_ms: Time from the call to the first new token, in milliseconds.
        tokens_per_second: New tokens per second of one greedy generation, prompt included in the
            time.
        by_depth: Time of a token by the number of tokens before it, as a text; empty where all
            tokens come from one call (Keras, SavedModels).
        by_batch: New tokens per second of all texts together, by how many they are and by the
            tokens before each, as texts; empty where the file was exported without batches.
        joules_per_token: Energy of a new token, of all that the processor did meanwhile, prompt
            included; `None` if it was not asked for, or the machine does not count it.
        load_seconds: From the path to a model that has made its first token, in a process of its
            own; `None` if it was not asked for, or the model is in memory alone.
        peak_rss_bytes: Most memory of that process, all of Python included, or `None`.
    """

    first_token_ms: float
    tokens_per_second: float
    by_depth: Mapping[str, Latency] = field(default_factory=dict)
    by_batch: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    joules_per_token: float | None = None
    load_seconds: float | None = None
    peak_rss_bytes: int | None = None


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare_speed(
    models: Mapping[str, Any],
    prompt: list[int] | Mapping[str, list[int]],
    new_tokens: int = 96,
    runs: int = 5,
) -> dict[str, Speed]:
    """Measures greedy generation of several models side by side.

    The models take turns within each run, so that a change of the machine's speed hits all.

    Args:
        models: Names to what `open_artifact` takes.
        prompt: Token ids; of models of several tokenizers, names to those.
        new_tokens: int. Tokens to generate. Defaults to `96`.
        runs: int. Measurements of each, after one that compiles. Defaults to `5`.

    Returns:
        Names to `Speed`.
    """
    artifacts = {name: open_artifact(model) for name, model in models.items()}
    calls = {}
    for name, artifact in artifacts.items():
        ids = prompt[name] if isinstance(prompt, Mapping) else prompt
        calls[name] = (artifact.generation(ids, 1), artifact.generation(ids, new_tokens))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for run in range(runs + 1):
        for name, (one, many) in calls.items():
            measured = (_seconds(one), _seconds(many))
            if run:  # The first run compiles.
                times[name].append(measured)
    return {
        name: Speed(
            first_token_ms=1e3 * statistics.median(first for first, _ in measured),
            tokens_per_second=new_tokens / statistics.median(many for _, many in measured),
        )
        for name, measured in times.items()
    }


def with_latencies(
    speeds: Mapping[str, Speed], artifacts: Mapping[str, Artifact], depths: Sequence[int] = DEPTHS
) -> dict[str, Speed]:
    """Returns speeds with the time of each token by depth, and of batches, the artifacts in turns.

    Args:
        speeds: What `compare_speed` gave.
        artifacts: The same names to artifacts.
        depths: Tokens before the new ones; those that a context cannot hold are left out.
    """
    found: dict[str, dict[str, Latency]] = {name: {} for name in speeds}
    together: dict[str, dict[str, dict[str, float]]] = {name: {} for name in speeds}
    for depth in depths:
        steps: dict[tuple[str, int], Callable[[], object] | None] = {}
        for name in speeds:
            artifact = artifacts[name]
            steps[name, 1] = artifact.steps(depth)
            if isinstance(artifact, InBatches):
                for size in artifact.batch_sizes:
                    steps[name, size] = artifact.steps_together(depth, size)
        for (name, size), took_all in _in_turns(steps).items():
            middle, *ends = (float(x) for x in np.percentile(took_all, (50, 95, 99)))
            if size == 1:
                found[name][str(depth)] = Latency(middle, *ends)
            if len([key for key in steps if key[0] == name]) > 1:
                together[name].setdefault(str(size), {})[str(depth)] = 1e3 * size / middle
    return {
        name: replace(speed, by_depth=found[name], by_batch=together[name])
        for name, speed in speeds.items()
    }


def _in_turns(
    steps: Mapping[tuple[str, int], Callable[[], object] | None],
) -> dict[tuple[str, int], list[float]]:
    """Returns the milliseconds of calls that take turns; those that are none are left out."""
    calls = {key: step for key, step in steps.items() if step is not None}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for run in range(_STEPS + 1):
        for key, step in calls.items():
            took = _seconds(step)
            if run:  # The first one makes buffers.
                times[key].append(1e3 * took)
    return times
