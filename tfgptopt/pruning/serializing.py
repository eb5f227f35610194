"""Patterns and scores as plain data, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tfgptopt.pruning.patterns import NM, Block, Columns, Pattern, Rows, Unstructured
from tfgptopt.pruning.scores import Magnitude, Movement, Wanda
from tfgptopt.pruning.sparsegpt import SparseGPT

_PATTERNS: dict[str, type[Any]] = {
    "unstructured": Unstructured,
    "nm": NM,
    "block": Block,
    "rows": Rows,
    "columns": Columns,
}
_SCORES: dict[str, type[Any]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "movement": Movement,
    "sparsegpt": SparseGPT,
}


def serialize_pattern(pattern: Pattern) -> dict[str, Any]:
    """Returns a pattern as plain data."""
    names = {pattern_class: name for name, pattern_class in _PATTERNS.items()}
    return {"name": names[type(pattern)], **asdict(pattern)}


def deserialize_pattern(config: dict[str, Any]) -> Pattern:
    """Returns the pattern that `serialize_pattern` wrote.

    Raises:
        ValueError: If the name or a setting is not known or out of range.
    """
    config = dict(config)
    name = config.pop("name", None)
    if name not in _PATTERNS:
        raise ValueError(f"A pattern is one of {', '.join(_PATTERNS)}. Received: {name!r}")
    try:
        pattern: Pattern = _PATTERNS[name](**config)
    except TypeError as error:
        raise ValueError(f"Wrong settings for {name}: {sorted(config)} ({error})") from None
    return pattern


def serialize_score(score: Any) -> str:
    """Returns the name of a score; its calibration data is not kept.

    Raises:
        ValueError: If it is no score.
    """
    for name, score_class in _SCORES.items():
        if isinstance(score, score_class):
            return name
    raise ValueError(f"A score is one of {', '.join(_SCORES)}. Received: {score!r}")


def deserialize_score(name: Any) -> Any:
    """Returns the score of a name, without calibration data.

    Raises:
        ValueError: If the name is not known.
    """
    if name not in _SCORES:
        raise ValueError(f"A score is one of {', '.join(_SCORES)}. Received: {name!r}")
    return _SCORES[name]()
