"""Shows the outcome of a job: a table in the terminal, and one HTML file with plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

import tfgptopt
from tfgptopt.evaluation import Result, perplexity
from tfgptopt.job.outcome import Outcome
from tfgptopt.pruning.schedules import Timeline
from tfgptopt.recipe import Prune

_COLORS = ("#8a8f98", "#3566c9", "#d9762b", "#2b9b6c")


def _cells(result: Result) -> list[str]:
    return [
        result.name,
        "" if result.size.parameters is None else f"{result.size.parameters / 1e6:.2f} M",
        "" if result.size.nonzero_share is None else f"{result.size.nonzero_share:.0%}",
        f"{result.size.file_bytes / 1e6:.2f}",
        f"{result.size.gzip_bytes / 1e6:.2f}",
        f"{result.perplexity:.2f}",
        f"{result.speed.first_token_ms:.1f}",
        f"{result.speed.tokens_per_second:,.0f}",
    ]


HEADINGS = (
    "",
    "weights",
    "non-zero",
    "MB",
    "MB gzip",
    "perplexity",
    "first token ms",
    "tokens/s",
)


def results_table(results: Sequence[Result]) -> Table:
    """Returns measurements as a table for a terminal of 80 columns."""
    narrow = ("", "weights", "non-\nzero", "MB", "MB\ngzip", "perp-\nlexity", "1st\nms")
    table = _compared((*narrow, "tokens\nper s"), 24)
    for result in results:
        table.add_row(*_cells(result))
    return table


def _compared(headings: Sequence[str], width: int) -> Table:
    """Returns a table of models, whose names are folded where they are longer than `width`."""
    table = Table(box=box.HORIZONTALS, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for i, heading in enumerate(headings):
        if i:
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, max_width=width, overflow="fold")
    return table


def quality_table(results: Sequence[Result]) -> Table:
    """Returns what models make of a text, with intervals, for a terminal of 80 columns."""
    table = _compared(("", "perplexity", "change", "bits/B", "right", "top 5", "KL", "same"), 16)
    for result in results:
        quality = result.quality
        low, high = (perplexity(loss) for loss in quality.intervals["loss"])
        change = quality.intervals.get("change")
        table.add_row(
            result.name,
            f"{quality.perplexity:.2f}\n{low:.2f}..{high:.2f}",
            f"{quality.change:+.2%}\n{change[0]:+.1%}..{change[1]:+.1%}"
            if change and quality.kl
            else "",
            "" if quality.bits_per_byte is None else f"{quality.bits_per_byte:.3f}",
            f"{quality.accuracy:.1%}",
            f"{quality.top5_accuracy:.1%}",
            f"{quality.kl:.4f}" if quality.kl else "",
            f"{quality.agreement:.1%}" if quality.kl and quality.agreement is not None else "",
        )
    return table


def domains_table(results: Sequence[Result]) -> Table:
    """Returns perplexity and bits per byte of each domain, a column for each model."""
    table = _compared(("domain", *(result.name for result in results)), 24)
    for domain in results[0].quality.domains:
        cells = []
        for result in results:
            quality = result.quality.domains[domain]
            change = "" if not quality.kl else f"\n{quality.change:+.2%}"
            bits = "" if quality.bits_per_byte is None else f" ({quality.bits_per_byte:.3f})"
            cells.append(f"{quality.perplexity:.2f}{bits}{change}")
        table.add_row(domain, *cells)
    return table


def tasks_table(results: Sequence[Result]) -> Table:
    """Returns what models reached in tasks, a column for each model."""
    table = _compared(("task", *(result.name for result in results)), 24)
    for task, first in results[0].tasks.items():
        for number in first.numbers:
            cells = []
            for result in results:
                score = result.tasks[task]
                known = score.intervals.get(number)
                around = "" if known is None else f"\n{known[0]:.3f}..{known[1]:.3f}"
                cells.append(f"{score.numbers[number]:.3f}{around}")
            table.add_row(f"{task} {number}", *cells)
    return table


def latency_table(results: Sequence[Result]) -> Table:
    """Returns how evenly tokens come, and what loading takes, as far as it was measured."""
    heads = ("", "load s", "peak MB", "depth", "p50 ms", "p95 ms", "p99 ms")
    table = _compared(heads, 24)
    for result in results:
        speed = result.speed
        load = "" if speed.load_seconds is None else f"{speed.load_seconds:.2f}"
        peak = "" if speed.peak_rss_bytes is None else f"{speed.peak_rss_bytes / 1e6:.0f}"
        rows = [
            (depth, *(f"{ms:.2f}" for ms in (one.p50, one.p95, one.p99)))
            for depth, one in speed.by_depth.items()
        ] or [("", "", "", "")]
        for i, row in enumerate(rows):
            table.add_row(*(("", "", "") if i else (result.name, load, peak)), *row)
    return table


def summary_lines(outcome: Outcome) -> list[str]:
    """Returns what the measurements say, in a few sentences."""
    dense, dense_file, *stages, small, small_file = outcome.results
    change = small_file.perplexity / dense.perplexity - 1
    return [
        f"The optimized file is {small_file.size.file_bytes / dense_file.size.file_bytes:.2f} of "
        f"the float32 file ({small_file.size.gzip_bytes / dense_file.size.gzip_bytes:.2f} under "
        f"gzip), at {change:+.1%} perplexity.",
        f"It generates {small_file.speed.tokens_per_second / dense.speed.tokens_per_second:.1f} "
        "times the tokens per second of Keras' compiled generate with the dense model "
        f"({small_file.speed.tokens_per_second / small.speed.tokens_per_second:.1f} times with "
        "the optimized one).",
        *(_stage_line(stage, dense_file) for stage in stages),
        f"A bigram model has perplexity {perplexity(outcome.bigram_loss):.2f} "
        f"(loss {outcome.bigram_loss:.3f}); the dense GPT {dense.perplexity:.2f} "
        f"(loss {dense.loss:.3f}).",
    ]


def _stage_line(stage: Result, dense: Result) -> str:
    """Returns what one stage on the way changed."""
    size = (stage.size.parameters or 0) / (dense.size.parameters or 1)
    speed = stage.speed.tokens_per_second / dense.speed.tokens_per_second
    change = stage.perplexity / dense.perplexity - 1
    return (
        f"{stage.name}: {size:.2f} of the weights, {speed:.2f} times the tokens per second, "
        f"{change:+.1%} perplexity, against the dense file."
    )


def _inline(figure: Figure) -> str:
    """Returns a figure as an image inside a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _loss_figure(outcome: Outcome) -> Figure:
    """Draws loss over steps, with the pruning schedule under it."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    prunes: list[Prune] = [t for t in outcome.recipe.techniques if isinstance(t, Prune)]
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 1)) if prunes else None
    top = figure.add_subplot(grid[0] if grid else 111)
    last = 0
    for (name, curve), color in zip(outcome.curves.items(), _COLORS, strict=False):
        top.plot([c[0] for c in curve], [c[1] for c in curve], label=name, color=color)
        last = max(last, curve[-1][0])
    top.axhline(outcome.bigram_loss, color="#555", ls=":", lw=1, label="bigram (held-out)")
    top.set_ylabel("training loss")
    top.legend(frameon=False)
    _tidy(top)
    if grid:
        bottom = figure.add_subplot(grid[1], sharex=top)
        timeline = Timeline(prunes[0].schedule)
        steps, values, held = range(last + 1), [], 0.0
        for step in steps:
            fires, sparsity = timeline.at(step)
            held = sparsity if fires else held
            values.append(held)
        bottom.fill_between(steps, values, step="post", color=_COLORS[2], alpha=0.35)
        bottom.set_ylabel("sparsity")
        bottom.set_ylim(0, 1)
        bottom.set_xlabel("step")
        _tidy(bottom)
    else:
        top.set_xlabel("step")
    return figure


def _sparsity_figure(outcome: Outcome) -> Figure:
    """Draws the share of zeros of each kernel."""
    names = [path.removesuffix("/kernel") for path in outcome.sparsity]
    shared = _common_prefix(names)
    figure = Figure(figsize=(8, 0.9 + 0.22 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([n[shared:] for n in names], list(outcome.sparsity.values()), color=_COLORS[2])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of exact zeros")
    axes.tick_params(axis="y", labelsize=8)
    _tidy(axes)
    return figure


def _common_prefix(names: Sequence[str]) -> int:
    """Returns the length of the folders that all names begin with."""
    folders = [name.split("/")[:-1] for name in names]
    same = 0
    while all(len(f) > same and f[same] == folders[0][same] for f in folders):
        same += 1
    return len("/".join(folders[0][:same])) + bool(same) if folders else 0


def _bars_figure(outcome: Outcome) -> Figure:
    """Draws size, speed and quality before and after."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    panels = (
        ("MB on disk", [r.size.file_bytes / 1e6 for r in outcome.results], "{:.1f}"),
        ("tokens per second", [r.speed.tokens_per_second for r in outcome.results], "{:,.0f}"),
        ("perplexity", [r.perplexity for r in outcome.results], "{:.1f}"),
    )
    names = [result.name.replace(" ", "\n") for result in outcome.results]
    for i, (title, values, form) in enumerate(panels):
        axes = figure.add_subplot(1, 3, i + 1)
        bars = axes.bar(names, values, color=_COLORS)
        axes.bar_label(bars, [form.format(value) for value in values], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(y=0.15)
        _tidy(axes)
    return figure


def write_report(outcome: Outcome, path: Path) -> None:
    """Writes one self-contained page with tables and plots.

    Args:
        outcome: The outcome of a job.
        path: The file to write.
    """
    template = resources.files("tfgptopt.job").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    figures = {
        "Size, speed and quality": _bars_figure(outcome),
        "Loss over steps, and the pruning schedule": _loss_figure(outcome),
        "Sparsity of each kernel": _sparsity_figure(outcome),
    }
    corpus = outcome.corpus
    page = environment.from_string(template).render(
        headings=HEADINGS,
        rows=[_cells(result) for result in outcome.results],
        lines=summary_lines(outcome),
        figures={title: _inline(figure) for title, figure in figures.items()},
        recipe=yaml.safe_dump(outcome.recipe.to_config(), sort_keys=False),
        sample=outcome.sample,
        facts={
            "Training text": corpus.training_words,
            "Held-out text": corpus.validation_words,
            "Bytes that were no UTF-8": f"{corpus.bad_bytes:,}",
            "Devices": outcome.strategy,
            "tfgptopt": tfgptopt.__version__,
        },
    )
    path.write_text(page, "utf-8")
