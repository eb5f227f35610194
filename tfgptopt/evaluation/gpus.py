"""What data sheets say of GPUs that models like ours are trained on. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU, by its data sheet.

    Attributes:
        name: What it is called.
        memory_bytes: Its memory.
        flops: Operations per second of products of 16-bit matrices, dense, summed in float32.
        bandwidth: Bytes per second of its memory.
    """

    name: str
    memory_bytes: int
    flops: float
    bandwidth: float


# The memory of data sheets, of which drivers and the framework take about one GB.
GPUS = (
    Gpu("T4 (float16)", 16 << 30, 65e12, 320e9),
    Gpu("V100 16 GB (float16)", 16 << 30, 125e12, 900e9),
    Gpu("L4", 24 << 30, 121e12, 300e9),
    Gpu("A10", 24 << 30, 125e12, 600e9),
    Gpu("RTX 4090", 24 << 30, 165e12, 1008e9),
    Gpu("A100 40 GB", 40 << 30, 312e12, 1555e9),
    Gpu("A100 80 GB", 80 << 30, 312e12, 2039e9),
    Gpu("H100 SXM", 80 << 30, 989e12, 3350e9),
)
