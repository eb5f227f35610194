"""Pruning: which weights go (patterns, scores), when (schedules), and how they are held (masks)."""

from tfgptopt.pruning.patterns import (
    NM,
    Block,
    Columns,
    Pattern,
    Rows,
    Unstructured,
    register_pattern,
)
from tfgptopt.pruning.penalties import GroupLasso
from tfgptopt.pruning.pruner import Pruner
from tfgptopt.pruning.regrowth import SET, RigL
from tfgptopt.pruning.schedules import (
    ConstantSparsity,
    PolynomialDecay,
    PruningSchedule,
    Threshold,
)
from tfgptopt.pruning.scores import Magnitude, Movement, Random, Score, Wanda
from tfgptopt.pruning.sensitivities import sensitivity
from tfgptopt.pruning.sparsegpt import SparseGPT
from tfgptopt.pruning.sparsity_allocation import Allocation, owl
from tfgptopt.pruning.sparsity_report import report
from tfgptopt.pruning.technique import Prune

__all__ = [
    "NM",
    "SET",
    "Allocation",
    "Block",
    "Columns",
    "ConstantSparsity",
    "GroupLasso",
    "Magnitude",
    "Movement",
    "Pattern",
    "PolynomialDecay",
    "Prune",
    "Pruner",
    "PruningSchedule",
    "Random",
    "RigL",
    "Rows",
    "Score",
    "SparseGPT",
    "Threshold",
    "Unstructured",
    "Wanda",
    "owl",
    "register_pattern",
    "report",
    "sensitivity",
]
