"""What loading an artifact takes, in a process that holds nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tfgptopt.evaluation.artifacts import Artifact
from tfgptopt.evaluation.speed import Speed
from tfgptopt.terminal.progress import track


def with_processes(
    speeds: Mapping[str, Speed], artifacts: Mapping[str, Artifact]
) -> dict[str, Speed]:
    """Returns speeds with the time of loading and the peak memory of a process of its own.

    Args:
        speeds: Names to speeds.
        artifacts: The same names to artifacts; those without a path are passed over.

    Raises:
        RuntimeError: If a process fails.
    """
    found = dict(speeds)
    for name in track(list(speeds), "Loading each in a process of its own"):
        path = artifacts[name].path
        if path is not None:
            found[name] = _measured(speeds[name], artifacts[name].kind, path)
    return found


def _measured(speed: Speed, kind: str, path: Path) -> Speed:
    command = [sys.executable, str(Path(__file__).with_name("child.py")), kind, str(path)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"Loading '{path}' failed: {result.stderr.strip()[-500:]}")
    numbers = json.loads(result.stdout.splitlines()[-1])
    return replace(speed, **numbers)
