"""Quantization: specs, the one rounding function, training with it, methods without training."""

from tfgptopt.quantization.layers import QuantizeAware
from tfgptopt.quantization.specs import Int4, Int8

__all__ = ["Int4", "Int8", "QuantizeAware"]
