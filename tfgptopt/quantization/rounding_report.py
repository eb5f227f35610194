"""What rounding does to each weight of a model, and to what its products give."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from rich.console import Group
from rich.table import Table

from tfgptopt.calibration.watching import observe_all
from tfgptopt.model.current import current
from tfgptopt.model.targets import Skipped, Target, candidates
from tfgptopt.model.types import Data
from tfgptopt.quantization import layers, rounding
from tfgptopt.quantization.outliers import Outliers, Spread, SpreadOfRows
from tfgptopt.quantization.quantizers import Quantizer, quantizers_of
from tfgptopt.quantization.row_rounding import fake_quantize_rows
from tfgptopt.quantization.specs import Spec
from tfgptopt.terminal.tables import across_layers, as_text


@dataclass(frozen=True)
class Row:
    """One rounded weight.

    Attributes:
        path: Path of the weight.
        spec: What it is rounded to.
        bits: 4 or 8.
        smallest_scale, largest_scale: Range of its scales.
        clipped: Share of weights beyond the largest integer.
        weight_sqnr: Ratio of signal to quantization noise of the weights, in dB; infinite for
            weights that lie on their grid already, as GPTQ leaves them.
        output_sqnr: The same of what the product gives, inputs rounded too; `None` if it was not
            measured.
        inputs: How the features of its input rows are spread, or `None` likewise.
    """

    path: str
    spec: Spec
    bits: int
    smallest_scale: float
    largest_scale: float
    clipped: float
    weight_sqnr: float
    output_sqnr: float | None = None
    inputs: Spread | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """The rounded weights of a model; print it to see a table.

    The table has one row for the weights that stand in the same place of each layer and are rounded
    alike, with the worst that one of them has.

    Attributes:
        rows: One for each rounded weight.
        skipped: Path and reason for each weight that stays as it is.
    """

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def outliers(self) -> Outliers:
        """How far features stand out in what products read, where it was measured."""
        return Outliers({row.path: row.inputs for row in self.rows if row.inputs is not None})

    def __rich__(self) -> Group:
        title = f"{len(self.rows)} rounded weights; signal to noise in dB; range of input rows in "
        title += "their deviations; the worst of each line"
        table = Table(padding=(0, 1), title=title)
        table.add_column("weight", overflow="fold")
        for name in ("count", "bits", "scales", "clipped", "weights", "outputs", "rows"):
            table.add_column(name, justify="right", no_wrap=True)
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((across_layers(row.path), str(row.spec)), []).append(row)
        for (name, _), rows in groups.items():
            table.add_row(name, *_cells(rows))
        skipped = Table("left as it is", "why", padding=(0, 1))
        for cells in dict.fromkeys((across_layers(p), reason) for p, reason in self.skipped):
            skipped.add_row(*cells)
        return Group(table, skipped) if skipped.row_count else Group(table)

    def __str__(self) -> str:
        return as_text(self)


def _cells(rows: list[Row]) -> list[str]:
    """Returns what a table says of weights that are rounded alike."""
    low, high = min(r.smallest_scale for r in rows), max(r.largest_scale for r in rows)
    weights = min(row.weight_sqnr for row in rows)
    ranges = [row.inputs.range for row in rows if row.inputs is not None]
    measured = [row.output_sqnr for row in rows if row.output_sqnr is not None]
    return [
        str(len(rows)),
        str(rows[0].bits),
        f"{low:.0e}-{high:.0e}",
        f"{max(row.clipped for row in rows):.1%}",
        "exact" if np.isinf(weights) else f"{weights:.1f}",
        f"{min(measured):.1f}" if measured else "",
        f"{max(ranges):.1f}" if ranges else "",
    ]


def report(model: keras.Layer, data: Data = None) -> QuantizationReport:
    """Reports what rounding does to each weight of a model.

    Args:
        model: A model that is quantize-aware or was quantized, not finalized yet.
        data: Data that the model reads, to measure what products give. Defaults to `None`: only
            weights are measured.

    Returns:
        `QuantizationReport`; print it to see a table.

    Raises:
        ValueError: If nothing of the model is rounded, or it cannot read the data.

    Example:

    ```python
    tfgptopt.quantize_aware(gpt, Int4())
    print(tfgptopt.quantization.report(gpt, validation.take(1)))
    ```
    """
    found = list(candidates(model))
    targets = [item for item in found if isinstance(item, Target)]
    dressed = [target for target in targets if layers.is_dressed(target.layer)]
    if not dressed:
        raise ValueError(
            f"The model '{model.name}' has no rounded weights, or was finalized: see "
            "`tfgptopt.summary(model)`."
        )
    outputs: dict[int, _Noise] = {}
    if data is not None:
        kernels = [target for target in dressed if target.role != "embedding"]
        outputs = {id(target.variable): _Noise(target) for target in kernels}
        observe_all(model, kernels, data, lambda t, rows: outputs[id(t.variable)].add(t, rows))
    rows = []
    for target in dressed:
        noise = outputs.get(id(target.variable))
        for quantizer in quantizers_of(target.layer):
            rows.append(_row(target, quantizer, noise))
    skipped = [(item.path, item.reason) for item in found if isinstance(item, Skipped)]
    skipped += [(t.path, "left as floats") for t in targets if t not in dressed]
    return QuantizationReport(tuple(rows), tuple(skipped))


def _decibels(signal: float, noise: float) -> float:
    return float("inf") if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))


def _row(target: Target, quantizer: Quantizer, noise: _Noise | None) -> Row:
    weights = current(target.layer, quantizer.variable)
    scale = quantizer.compute_scale(weights)
    integers, scale = rounding.quantize(weights, quantizer.grid, scale)
    error = rounding.dequantize(integers, scale, quantizer.grid) - weights
    inside = rounding.inside(weights, scale, quantizer.grid)
    return Row(
        path=quantizer.variable.path,
        spec=target.layer.quantization_spec,
        bits=quantizer.grid.bits,
        smallest_scale=float(tf.reduce_min(scale)),
        largest_scale=float(tf.reduce_max(scale)),
        clipped=1.0 - float(tf.reduce_mean(tf.cast(inside, tf.float32))),
        weight_sqnr=_decibels(
            float(tf.reduce_sum(tf.square(weights))), float(tf.reduce_sum(tf.square(error)))
        ),
        output_sqnr=None if noise is None else _decibels(noise.signal, noise.noise),
        inputs=None if noise is None else noise.spread.result(),
    )


class _Noise:
    """Sums signal and noise of what the product of a target gives."""

    def __init__(self, target: Target) -> None:
        quantizer = quantizers_of(target.layer)[0]
        weights = current(target.layer, quantizer.variable)
        self._exact, self._rounded = weights, quantizer.fake_quantize(weights)
        self._rounds_inputs = target.layer.quantization_spec.activations is not None
        self._parts = target.layer._row_blocks
        self.signal = self.noise = 0.0
        self.spread = SpreadOfRows()

    def add(self, part: Target, rows: tf.Tensor) -> None:
        """Adds what the product, or that of one expert, gives for some rows."""
        self.spread.add(rows)
        exact = rows @ part.to_matrix(self._exact)
        inputs = rows
        if self._rounds_inputs:
            inputs = fake_quantize_rows(rows, (-1,), self._parts)
        self.signal += float(tf.reduce_sum(tf.square(exact)))
        self.noise += float(
            tf.reduce_sum(tf.square(inputs @ part.to_matrix(self._rounded) - exact))
        )
