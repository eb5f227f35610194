"""Quantization: specs, the one rounding function, training with it, methods without training."""

from tfgptopt.quantization.aware import quantize_aware_layer
from tfgptopt.quantization.bit_allocation import BitAllocation, allocate
from tfgptopt.quantization.outliers import Outliers, outliers
from tfgptopt.quantization.rotation import Rotate, rotate
from tfgptopt.quantization.rounding_report import QuantizationReport, report
from tfgptopt.quantization.sorting import sort_neurons
from tfgptopt.quantization.specs import Int4, Int8
from tfgptopt.quantization.technique import QuantizeAware

__all__ = [
    "BitAllocation",
    "Int4",
    "Int8",
    "Outliers",
    "QuantizationReport",
    "QuantizeAware",
    "Rotate",
    "allocate",
    "outliers",
    "quantize_aware_layer",
    "report",
    "rotate",
    "sort_neurons",
]
