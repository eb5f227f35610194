"""Results in a file, so that several runs can be compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfgptopt.evaluation import Result
from tfgptopt.file.replacing import replacing

SCHEMA = 1


def as_plain(results: Sequence[Result], about: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns results as JSON has them.

    Args:
        results: The results.
        about: What else is to be known, such as the text. Defaults to `None`.
    """
    rows = []
    for result in results:
        quality = dataclasses.asdict(result.quality)
        rows.append(
            {
                "name": result.name,
                "size": dataclasses.asdict(result.size),
                "quality": {"perplexity": result.perplexity, **quality},
                "speed": dataclasses.asdict(result.speed),
            }
        )
    return {"schema": SCHEMA, "about": about or {}, "results": rows}


def save_results(
    results: Sequence[Result], path: str | Path, about: dict[str, Any] | None = None
) -> None:
    """Writes results as JSON; a file that is there is replaced.

    Args:
        results: What `evaluate` gave.
        path: The file.
        about: What else is to be known, such as the text. Defaults to `None`.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(as_plain(results, about), indent=1) + "\n", "utf-8")
