"""What a machine has of that which this package needs, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tfgptopt.backend import advice, configured_backend
from tfgptopt.generation.weight_cache import ENVIRONMENT, cache_folder

_LEAST_MEMORY_GB = 2.0
_LEAST_CACHE_GB = 1.0
_FOR_DEVELOPERS = {"test", "docs"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: What it is.
        found: What it is here.
        problem: What to do about it. Defaults to `None`: it is fine.
    """

    name: str
    found: str
    problem: str | None = None


def examine() -> list[Finding]:
    """Returns what was found of versions, devices, kernels, memory, the cache folder and extras.

    Nothing is changed. TensorFlow is loaded, to see its devices.

    Example:

    ```python
    for finding in examine():
        print(finding.name, finding.found, finding.problem or "")
    ```
    """
    return [
        Finding("tfgptopt", metadata.version("tfgptopt")),
        Finding("Python", platform.python_version()),
        *_requirements(),
        _backend(),
        _devices(),
        _kernels(),
        _memory(),
        _cache(),
        *_extras(),
    ]


def _requirements() -> Iterator[Finding]:
    for text in metadata.requires("tfgptopt") or []:
        requirement = Requirement(text)
        if requirement.marker is None:
            yield _installed(requirement)


def _installed(requirement: Requirement) -> Finding:
    """Returns whether a package is there, in a version that does."""
    command = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "missing", command)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, version)
    again = ", then start Python (in Colab: the runtime) again" if _loaded(requirement) else ""
    return Finding(requirement.name, version, command + again)


def _loaded(requirement: Requirement) -> bool:
    return requirement.name.replace("-", "_") in sys.modules


def _backend() -> Finding:
    return Finding("backend of Keras", configured_backend(), advice())


def _devices() -> Finding:
    try:
        import tensorflow as tf
    except Exception as error:  # Whatever a broken installation raises.
        return Finding("devices", f"TensorFlow does not load: {error}", "install it again")
    kinds = [device.device_type for device in tf.config.list_physical_devices()]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return Finding("devices of TensorFlow", ", ".join(counts))


def _kernels() -> Finding:
    """Returns which instructions LiteRT's kernels for integers find."""
    cores = f"{os.cpu_count()} cores"
    try:
        flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:
        return Finding("CPU", f"{cores}, {platform.machine()}")
    names = {
        "avx512_vnni": "AVX512-VNNI",
        "avx_vnni": "AVX-VNNI",
        "avx512f": "AVX512",
        "avx2": "AVX2",
        "i8mm": "I8MM",
        "asimddp": "dot products",
    }
    best = next((words for flag, words in names.items() if flag in flags), platform.machine())
    return Finding("CPU", f"{cores}, int8 by {best}")


def _memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        free = next(int(line.split()[1]) / 1e6 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return Finding("free memory", "not known")
    problem = None
    if free < _LEAST_MEMORY_GB:
        problem = (
            f"training a small model takes {_LEAST_MEMORY_GB:.0f} GB: close other programs, or "
            "take a smaller batch and `accumulate`"
        )
    return Finding("free memory", f"{free:.1f} GB", problem)


def _cache() -> Finding:
    """Returns where packed weights are kept."""
    folder = cache_folder(True)
    if folder is None:
        return Finding("cache of packed weights", f"off ({ENVIRONMENT}): files load slower")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    problem = None
    if not os.access(there, os.W_OK):
        problem = f"it cannot be written: set {ENVIRONMENT} to another folder, or to off"
    elif free < _LEAST_CACHE_GB:
        problem = f"only {free:.1f} GB are free: set {ENVIRONMENT} to another folder, or to off"
    return Finding("cache of packed weights", str(folder), problem)


def _extras() -> Iterator[Finding]:
    """Returns which extras are there; what is not is no problem."""
    requirements = [Requirement(text) for text in metadata.requires("tfgptopt") or []]
    for extra in sorted(metadata.metadata("tfgptopt").get_all("Provides-Extra") or []):
        if extra in _FOR_DEVELOPERS:
            continue
        needed = [
            requirement
            for requirement in requirements
            if requirement.marker and requirement.marker.evaluate({"extra": extra})
        ]
        missing = [one.name for one in needed if _installed(one).problem]
        words = "there" if not missing else f"not there: pip install 'tfgptopt[{extra}]'"
        yield Finding(f"extra {extra}", words)
