"""What the machine can do: cores, memory, and how fast numbers come out of memory."""

from __future__ import annotations

import os
import platform
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Larger than caches, so that memory is read.
_BYTES = 256 << 20
_SECONDS = 0.6


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        processor: Its name, as far as the system tells it.
        cores: Logical cores that this process may use.
        memory_bytes: Memory of the machine.
        bandwidth: Bytes per second that all cores together read from memory, the best of several
            tries. What it decides: a token reads all weights once.
        flops: Float32 operations per second of a large matrix product.
        gpus: Names of GPUs that TensorFlow sees.
    """

    processor: str
    cores: int
    memory_bytes: int
    bandwidth: float
    flops: float
    gpus: tuple[str, ...] = ()

    def tokens_per_second_floor(self, weight_bytes: float) -> float:
        """Returns how many tokens a second the memory allows, each reading all weights once.

        Args:
            weight_bytes: Bytes that one token reads.
        """
        return self.bandwidth / weight_bytes


def measure_machine() -> Machine:
    """Measures the machine, in about a second.

    Example:

    ```python
    from tfgptopt.evaluation.machine import measure_machine

    machine = measure_machine()
    print(f"{machine.cores} cores, {machine.bandwidth / 1e9:.0f} GB/s")
    ```
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(_processor(), cores, pages * size, _bandwidth(cores), _flops(), _gpus())


def _bandwidth(cores: int) -> float:
    """Returns the bytes per second that threads read, one a core, the best of several tries."""
    parts = [np.ones(_BYTES // cores // 8, np.int64) for _ in range(cores)]
    best, end = 0.0, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        # numpy reads without holding the interpreter.
        threads = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - began))
    return best


def _flops() -> float:
    """Returns the operations per second of TensorFlow's float32 matrix product, which trains."""
    import tensorflow as tf

    size, best = 512, 0.0
    matrix = tf.ones((size, size))
    tf.matmul(matrix, matrix).numpy()  # The first one makes threads.
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        tf.matmul(matrix, matrix).numpy()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _gpus() -> tuple[str, ...]:
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    details = (tf.config.experimental.get_device_details(device) for device in devices)
    return tuple(str(one.get("device_name", "GPU")) for one in details)


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
