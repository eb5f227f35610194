"""Keras callbacks that make a GPT smaller while `fit` runs."""

from tfgptopt.callbacks.pruning import Pruning
from tfgptopt.callbacks.quantization import QuantizationAwareTraining

__all__ = ["Pruning", "QuantizationAwareTraining"]
