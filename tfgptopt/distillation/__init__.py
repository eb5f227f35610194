"""Distillation: a small model learns what a large one knows."""

from tfgptopt.backend import require_tensorflow

require_tensorflow()

from tfgptopt.distillation.distiller import Distiller  # noqa: E402
from tfgptopt.distillation.features import AttentionMaps, HiddenStates  # noqa: E402
from tfgptopt.distillation.losses import HardLabels, LogitsKL  # noqa: E402
from tfgptopt.distillation.recording import Recording  # noqa: E402
from tfgptopt.distillation.teacher_to_disk import record  # noqa: E402

__all__ = [
    "AttentionMaps",
    "Distiller",
    "HardLabels",
    "HiddenStates",
    "LogitsKL",
    "Recording",
    "record",
]
