"""How far the largest features of rows stand out: what int8 activations lose by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.table import Table

from tfgptopt.calibration.routing import has_router
from tfgptopt.calibration.watching import observe_all
from tfgptopt.model.targets import Target, candidates
from tfgptopt.model.types import Data
from tfgptopt.terminal.tables import across_layers, as_text

# Channels that are named, and the range of normally distributed rows of some hundred features.
_NAMED, _NORMAL = 3, 6.3
# How wide the middle half of a normal distribution is, in standard deviations.
_MIDDLE_HALF = 1.349


@dataclass(frozen=True)
class Spread:
    """How the features of a product's input rows are spread.

    Attributes:
        range: What a row's scale has to cover, from its smallest to its largest feature, zero
            included, in standard deviations of its features, as the middle half of them has it:
            large ones do not count. The mean over rows. Some 6 for normally distributed features;
            int8 has 255 steps for all of it.
        kurtosis: Fourth moment of a row over the square of its second, the mean over rows: 3 for
            normally distributed features, more where few are much larger than the rest.
        channels: The features that most often are the largest of their row.
        share: In what share of rows one of these is.
    """

    range: float
    kurtosis: float
    channels: tuple[int, ...]
    share: float


class SpreadOfRows:
    """Gathers the spread of the rows that it is shown."""

    def __init__(self) -> None:
        self._ranges = self._kurtoses = 0.0
        self._rows = 0
        self._largest: Any = None

    def add(self, rows: tf.Tensor) -> None:
        """Adds rows, float32 `(rows, inputs)`. Rows of one value have no spread, and are left."""
        centered = rows - tf.reduce_mean(rows, 1, keepdims=True)
        second = tf.reduce_mean(tf.square(centered), 1)
        found = second > 0
        span = tf.maximum(tf.reduce_max(rows, 1), 0.0) - tf.minimum(tf.reduce_min(rows, 1), 0.0)
        ordered, count = tf.sort(rows, 1), int(rows.shape[1])
        middle = (ordered[:, 3 * count // 4] - ordered[:, count // 4]) / _MIDDLE_HALF
        # Half of the features may be the same, such as zero.
        deviation = tf.where(middle > 0, middle, tf.sqrt(second))
        fourth = tf.reduce_mean(tf.square(tf.square(centered)), 1)
        self._ranges += float(tf.reduce_sum((span / deviation)[found]))
        self._kurtoses += float(tf.reduce_sum((fourth / tf.square(second))[found]))
        self._rows += int(tf.math.count_nonzero(found))
        largest = tf.argmax(tf.abs(rows), 1).numpy()[found.numpy()]
        counts = np.bincount(largest, minlength=int(rows.shape[1]))
        self._largest = counts if self._largest is None else self._largest + counts

    def result(self) -> Spread | None:
        """Returns what was found, or `None` without rows."""
        if not self._rows:
            return None
        order = np.argsort(-self._largest, kind="stable")[:_NAMED]
        named = [int(i) for i in order if self._largest[i]]
        return Spread(
            self._ranges / self._rows,
            self._kurtoses / self._rows,
            tuple(named),
            float(self._largest[named].sum() / self._rows),
        )


@dataclass(frozen=True)
class Outliers:
    """The spread of the inputs of each product, by the path of its weight; print it for a table.

    The table has one row for the products that stand in the same place of each layer, with the one
    whose rows reach farthest.
    """

    spreads: Mapping[str, Spread]

    def __rich__(self) -> Table:
        table = Table(padding=(0, 1), title="Inputs of products, the farthest of each row")
        table.add_column("weight", overflow="fold")
        for name in ("range / spread", "kurtosis", "largest channels"):
            table.add_column(name, justify="right")
        for name, spread in self._farthest().items():
            channels = ", ".join(map(str, spread.channels))
            table.add_row(
                name, f"{spread.range:.1f}", f"{spread.kurtosis:.1f}",
                f"{channels} ({spread.share:.0%})",
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        return as_text(self)

    def _farthest(self) -> dict[str, Spread]:
        found: dict[str, Spread] = {}
        for path, spread in self.spreads.items():
            name = across_layers(path)
            if name not in found or spread.range > found[name].range:
                found[name] = spread
        return found

    def plot(self, path: str | Path | None = None, before: Outliers | None = None) -> Any:
        """Draws how far rows reach.

        Args:
            path: Image file to write. Defaults to `None`: only return the figure.
            before: The same of the model as it was, to be drawn beside. Defaults to `None`.

        Returns:
            `matplotlib.figure.Figure`.
        """
        from matplotlib.figure import Figure

        names = list(self.spreads)
        places = np.arange(len(names))
        figure = Figure(figsize=(8, max(3.0, 0.22 * len(names) + 1)), layout="constrained")
        axes = figure.subplots()
        if before is not None:
            earlier = [before.spreads[n].range if n in before.spreads else np.nan for n in names]
            axes.scatter(earlier, places, color="tab:orange", label="before")
        axes.scatter([self.spreads[n].range for n in names], places, label="now")
        axes.axvline(_NORMAL, color="gray", linestyle=":", label="normally distributed")
        axes.set_xscale("log")
        axes.set_xlabel("range of a row in standard deviations of its middle half")
        axes.set_yticks(places, ["/".join(n.split("/")[-4:]) for n in names], fontsize=7)
        axes.invert_yaxis()
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def outliers(model: keras.Layer, data: Data) -> Outliers:
    """Reports how far features stand out in what products read, before or after rounding.

    Args:
        model: A built Keras 3 model, plain or dressed.
        data: Data that it reads; a few windows of text are enough.

    Returns:
        `Outliers`; print it to see a table, `plot()` draws it.

    Raises:
        ValueError: If there is no product, no data, or the model cannot read it.

    Example:

    ```python
    before = tfgptopt.quantization.outliers(gpt, windows)
    tfgptopt.quantize(gpt, Int8(), "rotation")
    print(before, tfgptopt.quantization.outliers(gpt, windows))
    ```
    """
    found = [item for item in candidates(model) if isinstance(item, Target)]
    kernels = [t for t in found if t.role != "embedding"]
    kernels = [t for t, told in zip(kernels, has_router(model, kernels), strict=True) if told]
    if not kernels:
        raise ValueError(f"The model '{model.name}' has no product whose inputs could be seen.")
    seen = {id(target.variable): SpreadOfRows() for target in kernels}
    observe_all(model, kernels, data, lambda target, rows: seen[id(target.variable)].add(rows))
    results = {target.path: seen[id(target.variable)].result() for target in kernels}
    return Outliers({path: one for path, one in results.items() if one is not None})
