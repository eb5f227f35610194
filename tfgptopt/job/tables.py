"""Measurements as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from tfgptopt.evaluation import Result, perplexity
from tfgptopt.job.search import Found


def cells(result: Result) -> list[str]:
    """Returns a row of `HEADINGS`."""
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
        table.add_row(*cells(result))
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
        found = []
        for result in results:
            quality = result.quality.domains[domain]
            change = "" if not quality.kl else f"\n{quality.change:+.2%}"
            bits = "" if quality.bits_per_byte is None else f" ({quality.bits_per_byte:.3f})"
            found.append(f"{quality.perplexity:.2f}{bits}{change}")
        table.add_row(domain, *found)
    return table


def tasks_table(results: Sequence[Result]) -> Table:
    """Returns what models reached in tasks, a column for each model."""
    table = _compared(("task", *(result.name for result in results)), 24)
    for task, first in results[0].tasks.items():
        for number in first.numbers:
            found = []
            for result in results:
                score = result.tasks[task]
                known = score.intervals.get(number)
                around = "" if known is None else f"\n{known[0]:.3f}..{known[1]:.3f}"
                found.append(f"{score.numbers[number]:.3f}{around}")
            table.add_row(f"{task} {number}", *found)
    return table


def latency_table(results: Sequence[Result]) -> Table:
    """Returns how evenly tokens come, and what loading takes, as far as it was measured."""
    counted = any(result.speed.joules_per_token is not None for result in results)
    heads = ("", "load s", "peak MB", *(["J/token"] if counted else []),
             "depth", "p50 ms", "p95 ms", "p99 ms")  # fmt: skip
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
            joules = speed.joules_per_token
            energy = [] if not counted else ["" if joules is None or i else f"{joules:.3g}"]
            table.add_row(*(("", "", "") if i else (result.name, load, peak)), *energy, *row)
    return table


def batches_table(results: Sequence[Result]) -> Table:
    """Returns tokens per second by depth and batch, of files that have batches."""
    depths = list(dict.fromkeys(d for r in results for by in r.speed.by_batch.values() for d in by))
    table = _compared(("tokens/s, all texts", "texts", *(f"behind {d}" for d in depths)), 24)
    for result in results:
        for i, (size, by) in enumerate(result.speed.by_batch.items()):
            cells = (f"{by[d]:,.0f}" if d in by else "" for d in depths)
            table.add_row("" if i else result.name, size, *cells)
    return table


def trials_table(found: Found) -> Table:
    """Returns the trials of a search; those on the front have a star, the kept one an arrow."""
    table = _compared(("", "candidate", "steps", "MB", "gzip", "tok/s", "rise"), 2)
    for trial in found.trials:
        mark = "→" if trial is found.kept else "*" if trial in found.front else ""
        numbers = ("", "", "", "failed")
        if trial.error is None:
            numbers = (f"{trial.size / 1e6:.2f}", f"{trial.download / 1e6:.2f}",
                       f"{trial.speed:,.0f}", f"{trial.rise:+.1%}")  # fmt: skip
        table.add_row(mark, trial.name, str(trial.steps or ""), *numbers)
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    return table
