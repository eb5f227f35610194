"""How much the loss of a model rises when one weight after the other is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.table import Table

from tfgptopt.evaluation.sensitivity import Change, rise_of_loss
from tfgptopt.model.current import current
from tfgptopt.model.targets import Selector, Target
from tfgptopt.model.types import Data
from tfgptopt.pruning.patterns import Pattern, Unstructured
from tfgptopt.pruning.schedules import ConstantSparsity
from tfgptopt.pruning.scores import Magnitude, Meter, Movement, Score
from tfgptopt.pruning.sparsity_allocation import Allocation
from tfgptopt.pruning.technique import Prune
from tfgptopt.terminal.progress import Verbose, showing
from tfgptopt.terminal.tables import as_text


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Loss against sparsity for each weight; print it to see a table.

    Attributes:
        paths: Paths of the weights.
        sizes: How many values each has.
        sparsities: The sparsities that were tried, rising.
        losses: float array `(weights, sparsities)`: loss with this one weight pruned.
        dense_loss: Loss with nothing pruned.
    """

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    losses: np.ndarray
    dense_loss: float

    def __rich__(self) -> Table:
        table = Table(padding=(0, 1), title=f"rise of the loss above {self.dense_loss:.4f}")
        table.add_column("weight", overflow="fold")
        for sparsity in self.sparsities:
            table.add_column(f"{sparsity:.0%}", justify="right", no_wrap=True)
        for path, losses in zip(self.paths, self.losses, strict=True):
            table.add_row(path, *(f"{loss - self.dense_loss:+.4f}" for loss in losses))
        return table

    def __str__(self) -> str:
        return as_text(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the rise of the loss, a line for each weight, the most sensitive named.

        Args:
            path: Image file to write. Defaults to `None`: only return the figure.

        Returns:
            `matplotlib.figure.Figure`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        rises = np.c_[np.zeros(len(self.paths)), self.losses - self.dense_loss]
        shares = [0.0, *self.sparsities]
        worst = list(np.argsort(-rises[:, -1])[:5])
        for i, rise in enumerate(rises):
            if i not in worst:
                axes.plot(shares, rise, color="0.8", linewidth=1)
        for i in worst:
            axes.plot(shares, rises[i], marker="o", label="/".join(self.paths[i].split("/")[-3:]))
        axes.set_xlabel("sparsity of this weight alone")
        axes.set_ylabel(f"rise of the loss above {self.dense_loss:.3f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="most sensitive", fontsize="small", frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def allocate(self, sparsity: float) -> Allocation:
        """Spreads a sparsity over the weights so that the losses rise least in sum.

        Each weight's losses are taken as a convex line from one sparsity to the next, and the
        cheapest pieces of all lines are taken first. No weight goes beyond what was tried.

        Args:
            sparsity: float, the mean over all weights.

        Returns:
            `Allocation`.

        Raises:
            ValueError: If `sparsity` is not between 0 and the largest that was tried.
        """
        if not 0.0 < sparsity <= self.sparsities[-1]:
            raise ValueError(
                f"`sparsity` must lie above 0 and not above {self.sparsities[-1]}, the largest "
                f"that was tried. Received: {sparsity!r}"
            )
        pieces: list[tuple[float, int, float]] = []
        for i, losses in enumerate(self.losses):
            shares, rises = _lower_hull([0.0, *self.sparsities], [self.dense_loss, *losses])
            for j, step in enumerate(np.diff(shares)):
                price = (rises[j + 1] - rises[j]) / (step * self.sizes[i])
                pieces.append((float(price), i, float(step)))
        left = float(sparsity * sum(self.sizes))
        given = np.zeros(len(self.paths))
        for _, i, length in sorted(pieces):
            taken = min(length, left / self.sizes[i])
            given[i] += taken
            left -= taken * self.sizes[i]
        return Allocation(dict(zip(self.paths, given.tolist(), strict=True)))


def _lower_hull(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns the corners of the largest convex line below some points."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [p[0] for p in hull], [p[1] for p in hull]


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def sensitivity(
    model: keras.Model,
    data: Data,
    sparsities: Sequence[float] = (0.5, 0.75),
    pattern: Pattern = Unstructured(),
    score: Score = Magnitude(),
    targets: Selector | None = None,
    verbose: Verbose = "auto",
) -> Sensitivity:
    """Measures how much the loss rises when one weight after the other is pruned.

    Args:
        model: A built and compiled Keras 3 model. Its weights are the same afterwards.
        data: What `model.evaluate` takes, with labels; a few batches are enough.
        sparsities: Sparsities to try, rising, in `(0, 1)`. Defaults to `(0.5, 0.75)`.
        pattern: Which weights go together. Defaults to `Unstructured()`.
        score: How important a weight is. Defaults to `Magnitude()`.
        targets: Selector of the weights. Defaults to `None`: all kernels but the head.
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.

    Returns:
        `Sensitivity`, with `plot()` and `allocate(sparsity)`.

    Raises:
        ValueError: If the model is not compiled, or a setting is out of range.

    Example:

    ```python
    scan = tfgptopt.pruning.sensitivity(gpt, validation.take(8))
    scan.plot("sensitivity.png")
    tfgptopt.prune(gpt, 0.6, allocation=scan.allocate(0.6))
    ```
    """
    shares = [float(share) for share in sparsities]
    if not shares or shares != sorted(set(shares)) or not 0.0 < shares[0] <= shares[-1] < 1.0:
        raise ValueError(
            f"`sparsities` must rise and lie between 0 and 1. Received: {sparsities!r}"
        )
    if isinstance(score, Movement):
        raise ValueError("Movement gathers in training: use `Magnitude()` or `Wanda(data)` here.")
    for share in shares:
        chosen = Prune(ConstantSparsity(share, 0), pattern, score, targets).check(model)
    if not getattr(model, "compiled", False):
        raise ValueError("The model has no loss: compile it first.")
    meter = score.meter(model, chosen)
    meter.prepare()
    changes = [
        Change(target, partial(_pruned, pattern, meter, i, target, share))
        for i, target in enumerate(chosen)
        for share in shares
    ]
    with showing(verbose):
        dense, rises = rise_of_loss(model, data, changes, "Measuring each weight")
    losses = dense + np.reshape(rises, (len(chosen), len(shares)))
    sizes = tuple(target.size for target in chosen)
    return Sensitivity(tuple(t.path for t in chosen), sizes, tuple(shares), losses, dense)


def _pruned(pattern: Pattern, meter: Meter, index: int, target: Target, share: float) -> Any:
    """Returns the values of a weight that is pruned to a share."""
    weights = current(target.layer, target.variable)
    scores = meter.scores(index, target.to_matrix(weights))
    (kept,) = pattern.masks([scores], [tf.constant(share)])
    return weights * tf.cast(target.from_matrix(kept), weights.dtype)
