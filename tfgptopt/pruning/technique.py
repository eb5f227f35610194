"""Pruning as a technique: its settings, and what they do to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfgptopt.pruning.patterns import Pattern, Unstructured
from tfgptopt.pruning.scores import Magnitude
from tfgptopt.pruning.sparsity_allocation import Allocation


@dataclass(frozen=True)
class Settings:
    """What moves the masks of a group of weights.

    Attributes:
        schedule: A tfmot schedule.
        pattern: Which weights go together.
        score: How important a weight is.
        allocation: How the sparsity is spread over weights, or `None`: evenly.
    """

    schedule: Any
    pattern: Pattern = Unstructured()
    score: Any = Magnitude()
    allocation: Allocation | None = None
