"""Joules of a token, where the processor counts them (RAPL), through codecarbon's reader.

Nothing is estimated: without counters there is no number.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from tfgptopt.evaluation.artifacts import Artifact
from tfgptopt.evaluation.speed import Speed
from tfgptopt.terminal.progress import track

_POWERCAP = Path("/sys/class/powercap")
# Counters move a thousand times a second; less would say little.
_SECONDS = 2.0
_JOULES = 3.6e6  # Of a kilowatt hour.


def why_not_measured() -> str | None:
    """Returns why this machine's energy cannot be measured, or `None` if it can."""
    counters = list(_POWERCAP.glob("*/energy_uj"))
    if not counters:
        return f"this machine shows no counters of energy (RAPL) in {_POWERCAP}"
    if not any(os.access(counter, os.R_OK) for counter in counters):
        return f"{counters[0]} may not be read: `sudo chmod -R a+r {_POWERCAP}` until the next boot"
    return None


def with_energy(
    speeds: Mapping[str, Speed],
    artifacts: Mapping[str, Artifact],
    prompts: Mapping[str, list[int]],
    new_tokens: int = 96,
) -> dict[str, Speed]:
    """Returns speeds with the joules of a new token, of all that the processor did meanwhile.

    Where they cannot be measured, a warning says why, and there is no number.

    Args:
        speeds: What `compare_speed` gave.
        artifacts: The same names to artifacts.
        prompts: The same names to token ids, which are read anew each time.
        new_tokens: int. Tokens of each generation. Defaults to `96`.

    Raises:
        ImportError: If there are counters, and codecarbon is not installed.
    """
    reason = why_not_measured()
    if reason is not None:
        warnings.warn(f"Energy was not measured: {reason}.", stacklevel=2)
        return dict(speeds)
    found = {}
    for name in track(list(speeds), "Measuring energy"):
        call = artifacts[name].generation(prompts[name], new_tokens)
        joules = _joules(call)
        found[name] = replace(
            speeds[name], joules_per_token=None if joules is None else joules / new_tokens
        )
    return found


def _joules(call: Callable[[], object]) -> float | None:
    """Returns the joules of a call, the mean of as many as take some seconds.

    Raises:
        ImportError: If codecarbon is not installed.
    """
    try:
        from codecarbon.core.cpu import IntelRAPL
        from codecarbon.core.units import Time
    except ImportError:
        raise ImportError(
            "Measuring energy needs codecarbon: pip install 'tfgptopt[energy]'."
        ) from None
    counters = IntelRAPL(str(_POWERCAP / "intel-rapl" / "subsystem"))
    call()  # The first one compiles.
    counters.start()
    began, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < _SECONDS:
        call()
        calls += 1
    details = counters.get_cpu_details(Time(took))
    joules = _JOULES * sum(value for key, value in details.items() if "Energy" in key)
    return joules / calls if joules > 0 else None
