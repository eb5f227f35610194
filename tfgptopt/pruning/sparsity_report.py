"""What pruning has made of a model: asked for, reached, and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from rich.table import Table

from tfgptopt.model import masks
from tfgptopt.model.targets import Target, candidates
from tfgptopt.pruning.patterns import Pattern
from tfgptopt.pruning.schedules import final_sparsity
from tfgptopt.pruning.technique import technique_of
from tfgptopt.terminal.tables import as_text


@dataclass(frozen=True)
class Row:
    """One pruned weight.

    Attributes:
        path: Path of the weight.
        shape: Its shape as a matrix, `(inputs, outputs)`.
        pattern: The pattern that was asked for.
        target: The sparsity that was asked for, or `None` if the schedule does not tell.
        sparsity: Share of exact zeros.
        holds: Whether the zeros have the pattern everywhere.
    """

    path: str
    shape: tuple[int, int]
    pattern: Pattern
    target: float | None
    sparsity: float
    holds: bool


@dataclass(frozen=True)
class PruningReport:
    """The pruned weights of a model; print it to see a table.

    Attributes:
        rows: One for each pruned weight.
    """

    rows: tuple[Row, ...]

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over all pruned weights."""
        sizes = [row.shape[0] * row.shape[1] for row in self.rows]
        return float(np.average([row.sparsity for row in self.rows], weights=sizes))

    @property
    def holds(self) -> bool:
        """Whether every pattern holds everywhere."""
        return all(row.holds for row in self.rows)

    def __rich__(self) -> Table:
        table = Table(padding=(0, 1), title=f"{self.sparsity:.1%} zeros in pruned weights")
        table.add_column("weight", overflow="fold")
        table.add_column("in x out", no_wrap=True)
        table.add_column("pattern", overflow="fold")
        for name in ("target", "zeros"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("holds", no_wrap=True)
        for row in self.rows:
            target = "" if row.target is None else f"{row.target:.1%}"
            shape = f"{row.shape[0]} x {row.shape[1]}"
            holds = "yes" if row.holds else "NO"
            table.add_row(row.path, shape, str(row.pattern), target, f"{row.sparsity:.1%}", holds)
        return table

    def __str__(self) -> str:
        return as_text(self)


def report(model: keras.Layer) -> PruningReport:
    """Reports what pruning has made of a model.

    Whether a pattern holds is read from the zeros of the weights, not from the masks.

    Args:
        model: A pruned model, not finalized yet.

    Returns:
        `PruningReport`; print it to see a table.

    Raises:
        ValueError: If nothing of the model is pruned.

    Example:

    ```python
    tfgptopt.prune(gpt, pattern=NM(2, 4))
    print(tfgptopt.pruning.report(gpt))
    ```
    """
    found = [item for item in candidates(model) if isinstance(item, Target)]
    pruned = [target for target in found if masks.masked(target.variable)]
    if not pruned:
        raise ValueError(
            f"The model '{model.name}' has no pruned weights, or was finalized: see "
            "`tfgptopt.summary(model)`."
        )
    return PruningReport(tuple(_row(target, _planned(target, pruned)) for target in pruned))


def _planned(target: Target, pruned: list[Target]) -> float | None:
    technique = technique_of(target)
    final = final_sparsity(technique.schedule)
    if final is None or technique.allocation is None:
        return final
    group = [t for t in pruned if technique_of(t) is technique]
    shares = technique.allocation.at(final, group)
    return shares[[t.path for t in group].index(target.path)]


def _row(target: Target, planned: float | None) -> Row:
    technique = technique_of(target)
    values: Any = keras.ops.convert_to_numpy(target.to_matrix(target.variable.value))
    kept = values != 0
    return Row(
        path=target.path,
        shape=target.matrix_shape,
        pattern=technique.pattern,
        target=planned,
        sparsity=float(1.0 - kept.mean()),
        holds=technique.pattern.holds(kept),
    )
