"""Quantization: specs, the one rounding function, training with it, methods without training."""

from tfgptopt.quantization.bit_allocation import BitAllocation, allocate
from tfgptopt.quantization.layers import QuantizeAware
from tfgptopt.quantization.rounding_report import QuantizationReport, report
from tfgptopt.quantization.specs import Int4, Int8

__all__ = [
    "BitAllocation",
    "Int4",
    "Int8",
    "QuantizationReport",
    "QuantizeAware",
    "allocate",
    "report",
]
