"""Pruning: which weights go (patterns), when (schedules), and how they are held (masks)."""

from tfgptopt.pruning.patterns import Unstructured
from tfgptopt.pruning.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule

__all__ = ["ConstantSparsity", "PolynomialDecay", "PruningSchedule", "Unstructured"]
