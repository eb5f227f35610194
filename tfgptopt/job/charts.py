"""Charts of a report, as SVG that takes the page's colors, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tfgptopt.evaluation.distributions import Distribution

# Colors that stand for those of the page, which its style sheet defines for light and dark.
_INK, _SOFT, _GRID = "#010203", "#040506", "#070809"
_SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06")
_ON_PAGE = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _GRID: "var(--line)",
    **{color: f"var(--series-{i})" for i, color in enumerate(_SERIES, 1)},
}
_STYLE: Any = {
    "svg.fonttype": "none",  # Text stays text.
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "grid.color": _GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


# Of an axis: closer points share a label.
_NEAR = 0.05
# Fewer exact zeros are not worth a word.
_ZEROS = 0.005


@dataclass(frozen=True)
class Point:
    """An artifact in a chart.

    Attributes:
        name: What it is called.
        megabytes: Its size.
        value: What stands above it.
    """

    name: str
    megabytes: float
    value: float


def front_chart(
    points: Sequence[Point], label: str, higher_is_better: bool, bandwidth: float | None = None
) -> str:
    """Returns size against speed or quality, with the front: what nothing beats in both.

    Args:
        points: The artifacts.
        label: What the upright axis shows.
        higher_is_better: Whether large values are good.
        bandwidth: Bytes per second that come out of memory: as many tokens a second as it allows a
            file of each size are drawn in. Defaults to `None`: not drawn.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(3.1)
        axes.set_xscale("log")
        sizes = [point.megabytes for point in points]
        if higher_is_better:
            axes.set_yscale("log")
        if bandwidth is not None:
            ends = [min(sizes) / 1.5, max(sizes) * 1.5]
            floor = [bandwidth / 1e6 / size for size in ends]
            axes.plot(ends, floor, color=_SOFT, ls="--", lw=1.2)
            axes.annotate(
                "what the memory allows",
                (ends[0], floor[0]),
                (6, 3),
                textcoords="offset points",
                color=_SOFT,
                fontsize=9,
            )
        front = _front(points, higher_is_better)
        axes.plot([p.megabytes for p in front], [p.value for p in front], color=_SERIES[0], lw=1.2)
        for point in points:
            color = _SERIES[0] if point in front else _SOFT
            axes.plot([point.megabytes], [point.value], "o", color=color, ms=7)
        axes.margins(0.12, 0.16)
        axes.set_xlabel("MB")
        axes.set_ylabel(label)
        _plain_numbers(axes, higher_is_better)
        for label_, place in _labels(axes, points):
            axes.annotate(
                label_,
                place,
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=10,
                fontweight="bold",
            )
        return _svg(figure, f"{label} against size: {_words(points)}", label)


def _front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Returns the points that no other one beats in size and value, by size."""
    sign = 1 if higher_is_better else -1
    found: list[Point] = []
    best = -math.inf
    for point in sorted(points, key=lambda p: (p.megabytes, -sign * p.value)):
        if sign * point.value > best:
            best = sign * point.value
            found.append(point)
    return found


def curves_chart(
    curves: Mapping[str, Sequence[Sequence[float]]], bigram_loss: float | None = None
) -> str:
    """Returns the training loss over steps, with the sparsity below it if there is any.

    Args:
        curves: Names of runs to `(step, loss, sparsity)`.
        bigram_loss: Loss of a bigram model, drawn in. Defaults to `None`.
    """
    with mpl.rc_context(_STYLE):
        pruned = any(point[2] for curve in curves.values() for point in curve)
        figure = Figure(figsize=(5.0, 3.9 if pruned else 3.0), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=(3, 1)) if pruned else None
        top = figure.add_subplot(grid[0] if grid else 111)
        bottom = figure.add_subplot(grid[1], sharex=top) if grid else None
        for (name, curve), color in zip(curves.items(), _SERIES * 9, strict=False):
            steps = [point[0] for point in curve]
            top.plot(steps, [point[1] for point in curve], label=name, color=color, lw=1.4)
            if bottom is not None and any(point[2] for point in curve):
                held = [point[2] for point in curve]
                bottom.fill_between(steps, held, step="post", color=color, alpha=0.4)
        if bigram_loss is not None:
            top.axhline(bigram_loss, color=_SOFT, ls=":", lw=1.2, label="bigram (held-out)")
        top.set_ylabel("training loss")
        top.legend(frameon=False, fontsize=9)
        top.grid(alpha=0.6)
        if bottom is not None:
            bottom.set_ylabel("sparsity")
            bottom.set_ylim(0, 1)
        (bottom or top).set_xlabel("step")
        return _svg(figure, f"Training loss over steps of {', '.join(curves)}", "curves")


def weights_chart(place: str, found: Distribution) -> str:
    """Returns how weights lay before, as an area, and after, as a line.

    Args:
        place: What they are called.
        found: Their bins.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _new(2.2)
        edges = np.linspace(found.low, found.high, len(found.before) + 1)
        axes.stairs(found.before, edges, fill=True, color=_SERIES[1], alpha=0.45, label="before")
        axes.stairs(found.after, edges, color=_SERIES[0], lw=1.4, label="after")
        if found.zeros > _ZEROS:
            text = f"{found.zeros:.0%} exact zeros, not drawn"
            axes.text(0.01, 0.97, text, transform=axes.transAxes, va="top", fontsize=9)
        axes.set_xlabel("weight")
        axes.set_ylabel("share")
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        axes.margins(x=0, y=0.12)
        words = f"Weights of {place} from {found.low:.3g} to {found.high:.3g}, before and after"
        return _svg(figure, f"{words}; {found.zeros:.1%} exact zeros after", place)


def _labels(axes: Axes, points: Sequence[Point]) -> list[tuple[str, tuple[float, float]]]:
    """Returns numbers of points, from 1, and where they stand; points that lie on each other share
    one label."""
    size = axes.bbox.size
    places = [axes.transData.transform((p.megabytes, p.value)) / size for p in points]
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        for group in groups:
            if abs(places[group[0]] - place).max() < _NEAR:
                group.append(i)
                break
        else:
            groups.append([i])
    return [
        (
            ", ".join(str(i + 1) for i in group),
            (points[group[0]].megabytes, points[group[0]].value),
        )
        for group in groups
    ]


def _new(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.6)
    return figure, axes


def _plain_numbers(axes: Axes, both: bool) -> None:
    """Writes numbers of logarithmic axes out, and at a few places only."""
    for axis in (axes.xaxis, axes.yaxis) if both else (axes.xaxis,):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        )
        axis.set_minor_formatter(NullFormatter())


def _number(value: float, _: object) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _words(points: Sequence[Point]) -> str:
    return "; ".join(f"{p.name} {p.megabytes:.2f} MB, {p.value:,.4g}" for p in points)


def _svg(figure: Figure, description: str, salt: str) -> str:
    """Returns a figure as SVG for the middle of a page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):  # Ids differ between figures of one page.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    for color, on_page in _ON_PAGE.items():
        text = text.replace(color, on_page)
    words = description.replace("&", "&amp;").replace('"', "'").replace("<", "&lt;")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)
