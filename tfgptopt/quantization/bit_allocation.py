"""Which weight gets how many bits: found by measuring what each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from rich.table import Table

from tfgptopt.evaluation.sensitivity import Change, divergences, rise_of_loss
from tfgptopt.model.current import current
from tfgptopt.model.targets import Selector, Target, select
from tfgptopt.model.types import Data
from tfgptopt.quantization import rounding
from tfgptopt.quantization.quantizers import check_fits, grids_of
from tfgptopt.quantization.specs import Int4, Int8, Spec, check_spec, serialize_spec, short_name
from tfgptopt.terminal.progress import Verbose, showing
from tfgptopt.terminal.tables import as_text

_FLOAT_BITS = 32.0


@dataclass(frozen=True)
class Measured:
    """What one choice for one weight costs.

    Attributes:
        spec: The choice.
        bits: Bits per weight, scales included.
        rise: How much the loss rises when this weight alone is rounded so, or how far predictions
            move, in nats.
    """

    spec: Spec | None
    bits: float
    rise: float


@dataclass(frozen=True)
class BitAllocation:
    """A spec for each weight, by its path; `None` leaves it as floats.

    It can be given wherever a spec can; print it to see a table. `allocate` finds one for a budget.

    Args:
        specs: Mapping from the path of a weight to `Int8()`, `Int4()` or `None`. Weights that are
            not in it stay floats.
        sizes: Number of values by path, if known.
        measured: What the choices cost by path, if known.

    Raises:
        ValueError: If it is empty or a value is no spec.
    """

    specs: Mapping[str, Spec | None]
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    measured: Mapping[str, tuple[Measured, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if not self.specs:
            raise ValueError("`specs` must name at least one weight. Received: {}")
        for spec in self.specs.values():
            if spec is not None:
                check_spec(spec)

    def match(self, chosen: list[Target]) -> list[tuple[Target, Spec | None]]:
        """Returns weights with their specs.

        Raises:
            ValueError: If it names a weight that is not among them.
        """
        unknown = set(self.specs) - {target.path for target in chosen}
        if unknown:
            raise ValueError(
                f"The allocation names {sorted(unknown)[0]}, which is none of the chosen weights, "
                f"such as {chosen[0].path}. Was it made for another model?"
            )
        return [(target, self.specs.get(target.path)) for target in chosen]

    def _chosen(self, path: str) -> Measured:
        return next(one for one in self.measured[path] if one.spec == self.specs[path])

    @property
    def mean_bits(self) -> float:
        """Bits per weight over all measured weights, scales included."""
        paths = list(self.measured)
        bits = [self._chosen(path).bits for path in paths]
        return float(np.average(bits, weights=[self.sizes[path] for path in paths]))

    def __rich__(self) -> Table:
        title = f"{self.mean_bits:.2f} bits per weight" if self.measured else None
        table = Table(padding=(0, 1), title=title)
        table.add_column("weight", overflow="fold")
        table.add_column("spec", min_width=8, overflow="fold")
        tried = [one.spec for one in next(iter(self.measured.values()), ()) if one.spec]
        for choice in tried:
            table.add_column(f"rise with\n{short_name(choice)}", justify="right")
        for path, spec in self.specs.items():
            costs = self.measured.get(path, ())
            rises = [f"{one.rise:+.5f}" for one in costs if one.spec is not None]
            table.add_row(path, "float" if spec is None else short_name(spec), *rises)
        return table

    def __str__(self) -> str:
        return as_text(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the bits that each weight gets, and what the fewest would cost.

        Args:
            path: Image file to write. Defaults to `None`: only return the figure.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            ValueError: If nothing was measured.
        """
        from matplotlib.figure import Figure

        if not self.measured:
            raise ValueError("Nothing was measured: `allocate` returns what can be drawn.")
        paths = list(self.measured)
        places = np.arange(len(paths))
        figure = Figure(figsize=(8, max(3.0, 0.22 * len(paths) + 1)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(places, [self._chosen(name).bits for name in paths], color="tab:blue")
        left.set_xlabel(f"bits per weight (mean {self.mean_bits:.2f})")
        fewest = [min(self.measured[name], key=lambda one: one.bits) for name in paths]
        right.barh(places, [one.rise for one in fewest], color="tab:orange")
        right.set_xlabel("rise of the loss with the fewest bits")
        right.xaxis.set_major_formatter("{x:.1g}")
        left.set_yticks(places, ["/".join(n.split("/")[-4:]) for n in paths], fontsize=7)
        left.invert_yaxis()
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def allocate(
    model: keras.Model,
    data: Data,
    bits: float,
    choices: Sequence[Spec | None] = (Int4(), Int8(), None),
    targets: Selector | None = None,
    verbose: Verbose = "auto",
    by: Literal["loss", "kl"] = "loss",
) -> BitAllocation:
    """Assigns a number of bits to each weight, so that the loss rises least within a budget.

    Each weight is rounded alone, to each choice, and the loss is measured, or how far predictions
    move. Then all weights begin with the fewest bits, and the budget is spent where a bit lowers
    that most.

    Args:
        model: A built Keras 3 model, compiled for `by="loss"`. Its weights are the same afterwards.
        data: What `model.evaluate` takes, with labels; a few batches are enough. For `by="kl"`,
            text without labels, as calibration takes it.
        bits: float, the mean over all weights, scales included.
        choices: Specs to choose from, `None` for floats. Defaults to `(Int4(), Int8(), None)`.
        targets: Selector of the weights. Defaults to `None`: kernels and tables.
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.
        by: `"loss"`, or `"kl"`: how far what a causal LM predicts moves from what it predicts as it
            is. That is steadier on little text: rounding one weight moves the loss up or down by
            chance, and the divergence up only. Defaults to `"loss"`.

    Returns:
        `BitAllocation`, to be given to `quantize`, `quantize_aware` or the callback; print it to
        see a table, `plot()` draws it.

    Raises:
        ValueError: If the model has no loss to go by, a choice does not fit, two differ only in
            `activation_blocks`, `by` is unknown, or `bits` is below the fewest that the choices
            allow.

    Example:

    ```python
    allocation = tfgptopt.quantization.allocate(gpt, validation.take(8), bits=6.0)
    print(allocation)
    tfgptopt.quantize(gpt, allocation)
    ```
    """
    if by not in ("loss", "kl"):
        raise ValueError(f'`by` must be "loss" or "kl". Received: {by!r}')
    if by == "loss" and not getattr(model, "compiled", False):
        raise ValueError('The model has no loss: compile it first, or give by="kl".')
    chosen = select(model, targets, ("kernel", "head", "embedding"), frozen=True)
    if not choices:
        raise ValueError("`choices` is empty: give specs such as (Int4(), Int8()).")
    for spec in choices:
        if spec is not None:
            check_spec(spec)
            check_fits(chosen, spec)
    _check_choices(choices)
    fewest = _mean([min(_bits(t, spec) for spec in choices) for t in chosen], chosen)
    if not isinstance(bits, int | float) or bits < fewest:
        raise ValueError(
            f"`bits` must be at least {fewest:.2f}, which all weights take with the fewest bits of "
            f"`choices`, scales included. Received: {bits!r}"
        )
    with showing(verbose):
        measured = _measure(model, data, chosen, choices, by)
    specs = _spend(chosen, measured, bits)
    return BitAllocation(specs, {t.path: t.size for t in chosen}, measured)


def _check_choices(choices: Sequence[Spec | None]) -> None:
    """Raises if choices differ only in what is not measured.

    Raises:
        ValueError: If two do.
    """
    seen: dict[object, Spec] = {}
    for spec in choices:
        if spec is None:
            continue
        config = serialize_spec(spec)
        parts = config.pop("activation_blocks", 1)
        other = seen.setdefault(tuple(config.items()), spec)
        if other.activation_blocks != parts:
            raise ValueError(
                "`choices` that differ only in `activation_blocks` cost the same bits, and "
                f"inputs are not rounded while weights are measured. Received: {other} and {spec}. "
                "Leave one of them out."
            )


def _mean(values: list[float], chosen: list[Target]) -> float:
    return float(np.average(values, weights=[target.size for target in chosen]))


def _bits(target: Target, spec: Spec | None) -> float:
    """Returns the bits that a weight takes in a file, its share of a scale included."""
    if spec is None:
        return _FLOAT_BITS
    _, grid = grids_of(target, spec)[0]
    if grid.block_size is not None:
        return grid.bits + 16.0 / grid.block_size
    return grid.bits + 32.0 / target.matrix_shape[0]


def _measure(
    model: keras.Model,
    data: Data,
    chosen: list[Target],
    choices: Sequence[Spec | None],
    by: str,
) -> dict[str, tuple[Measured, ...]]:
    changes = [
        Change(target, partial(_rounded, target, spec)) for target in chosen for spec in choices
    ]
    words = "Measuring each weight"
    if by == "kl":
        rises = divergences(model, data, changes, words)
    else:
        _, rises = rise_of_loss(model, data, changes, words)
    found: dict[str, list[Measured]] = {target.path: [] for target in chosen}
    specs = [spec for _ in chosen for spec in choices]
    for change, spec, rise in zip(changes, specs, rises, strict=True):
        found[change.target.path].append(Measured(spec, _bits(change.target, spec), rise))
    return {path: tuple(costs) for path, costs in found.items()}


def _rounded(target: Target, spec: Spec | None) -> Any:
    if spec is None:
        return None
    _, grid = grids_of(target, spec)[0]
    weights = current(target.layer, target.variable)
    find = rounding.absmax_scale if spec.scale == "absmax" else rounding.mse_scale
    integers, scale = rounding.quantize(weights, grid, find(weights, grid))
    return rounding.dequantize(integers, scale, grid)


def _spend(
    chosen: list[Target], measured: dict[str, tuple[Measured, ...]], bits: float
) -> dict[str, Spec | None]:
    """Gives each weight the fewest bits, then more where the loss falls most for a bit."""
    left = bits * sum(target.size for target in chosen)
    now = {}
    for target in chosen:
        now[target.path] = min(measured[target.path], key=lambda one: one.bits)
        left -= now[target.path].bits * target.size
    while True:
        best, gain, price = None, 0.0, 0.0
        for target in chosen:
            for one in measured[target.path]:
                more = (one.bits - now[target.path].bits) * target.size
                less = now[target.path].rise - one.rise
                if 0 < more <= left and less > 0 and less / more > gain:
                    best, gain, price = (target.path, one), less / more, more
        if best is None:
            return {path: one.spec for path, one in now.items()}
        now[best[0]] = best[1]
        left -= price
