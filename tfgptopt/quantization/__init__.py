"""Quantization: what to round to (specs), how (rounding), and training with it (layers)."""

from tfgptopt.quantization.specs import Int4, Int8

__all__ = ["Int4", "Int8"]
