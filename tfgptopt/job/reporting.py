"""One self-contained page of what was measured, of one run or of several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from tfgptopt.evaluation import Result, perplexity
from tfgptopt.evaluation.explain import Attribution, rank_correlation
from tfgptopt.evaluation.passages import ChangedPassage
from tfgptopt.evaluation.results import Run
from tfgptopt.file.replacing import replacing
from tfgptopt.job.charts import Point, curves_chart, front_chart, weights_chart
from tfgptopt.job.tables import HEADINGS, cells
from tfgptopt.terminal.tables import across_layers

# Rows of weights that are shown one by one; of more, those of all layers are one row.
_MOST_ROWS = 40
# Nats at which a token has all of its color.
_FULL = 2.0
# Mean change of a passage, in nats, from which on it is worth looking at.
_SHOWN = 0.02


@dataclass(frozen=True)
class _Bar:
    """A row of a chart of bars.

    Attributes:
        name: What it is of.
        share: How long the bar is, in [0, 1].
        text: The number.
    """

    name: str
    share: float
    text: str


def headline(run: Run) -> list[str]:
    """Returns what a run found, in sentences: how much smaller, faster and worse.

    Args:
        run: The run; the first sentence is of its last result.
    """
    results = {result.name: result for result in run.results}
    known = results.get(run.reference or "")
    others = [result for result in run.results if result is not known]
    lines = [] if known is None else [_compared(one, known) for one in reversed(others)]
    if not lines:
        one = run.results[-1]
        lines = [
            f"{one.name}: {one.size.file_bytes / 1e6:.2f} MB, "
            f"{one.speed.tokens_per_second:,.0f} tokens per second, perplexity "
            f"{one.perplexity:.2f}."
        ]
    bigram = None if run.training is None else run.training.bigram_loss
    if bigram is not None:
        lines.append(
            f"A bigram model has perplexity {perplexity(bigram):.2f} (loss {bigram:.3f}); "
            f"{run.results[0].name} {run.results[0].perplexity:.2f} "
            f"(loss {run.results[0].loss:.3f})."
        )
    return lines


def _compared(one: Result, known: Result) -> str:
    """Returns what is different between a model and the reference, in a sentence."""
    size = known.size.file_bytes / one.size.file_bytes
    speed = one.speed.tokens_per_second / known.speed.tokens_per_second
    quality, reference = one.quality, known.quality
    if quality.change is not None:
        low, high = quality.intervals.get("change", (quality.change, quality.change))
        worse = f"perplexity {quality.change:+.1%} (95 %: {low:+.2%} to {high:+.2%})"
    elif quality.bits_per_byte is not None and reference.bits_per_byte is not None:
        change = quality.bits_per_byte / reference.bits_per_byte - 1
        worse = f"{change:+.1%} bits per byte, with another tokenizer"
    else:
        worse = f"perplexity {quality.perplexity:.2f} instead of {reference.perplexity:.2f}"
    return (
        f"{one.name} is {_times(size, 'smaller', 'larger')} than {known.name} and "
        f"{_times(speed, 'faster', 'slower')}: {worse}."
    )


def _times(ratio: float, more: str, less: str) -> str:
    if 0.97 < ratio < 1.03:
        return f"no {more}"
    return f"{ratio:.1f} times {more}" if ratio > 1 else f"{1 / ratio:.1f} times {less}"


def _joined(runs: Sequence[Run]) -> list[tuple[str, Result]]:
    """Returns the results of all runs with names that differ."""
    counts: dict[str, int] = {}
    found = []
    for result in itertools.chain.from_iterable(run.results for run in runs):
        counts[result.name] = counts.get(result.name, 0) + 1
        number = counts[result.name]
        found.append((result.name if number == 1 else f"{result.name} ({number})", result))
    return found


def _charts(runs: Sequence[Run], named: Sequence[tuple[str, Result]]) -> dict[str, Markup]:
    """Returns titles to charts."""

    def points(value: str) -> list[Point]:
        of = {
            "speed": lambda r: r.speed.tokens_per_second,
            "bits": lambda r: r.quality.bits_per_byte,
            "perplexity": lambda r: r.perplexity,
        }[value]
        return [Point(n, r.size.file_bytes / 1e6, of(r)) for n, r in named]

    machine = next((run.machine for run in runs if run.machine is not None), None)
    bandwidth = None if machine is None else machine.bandwidth
    several = len({result.quality.tokens for _, result in named}) > 1
    bits = several and all(result.quality.bits_per_byte for _, result in named)
    quality = ("bits", "bits per byte") if bits else ("perplexity", "perplexity")
    found = {
        "Speed and size": front_chart(points("speed"), "tokens per second", True, bandwidth),
        "Quality and size": front_chart(points(quality[0]), quality[1], False),
    }
    for run in runs:
        if run.training is not None and run.training.curves:
            title = "Loss over steps" + (", and sparsity" if any(run.training.sparsity) else "")
            found[title] = curves_chart(run.training.curves, run.training.bigram_loss)
    return {title: Markup(chart) for title, chart in found.items()}


def _weights(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Returns places in layers and charts of the weights there, of each run."""
    return [
        (place.removesuffix("/kernel"), Markup(weights_chart(place, found)))
        for run in runs
        if run.training is not None
        for place, found in run.training.weights.items()
    ]


def _bars(runs: Sequence[Run]) -> dict[str, list[_Bar]]:
    """Returns titles to what each weight has."""
    found: dict[str, list[_Bar]] = {}
    for run in runs:
        if run.training is None:
            continue
        if any(run.training.sparsity.values()):
            shares = _grouped(run.training.sparsity)
            bars = [_Bar(name, share, f"{share:.0%}") for name, share in shares.items()]
            found["Share of exact zeros of each kernel"] = bars
        if run.training.noise:
            noise = _grouped(run.training.noise)
            most = max(noise.values())
            bars = [_Bar(n, max(0.0, db / most), f"{db:.1f} dB") for n, db in noise.items()]
            found["Signal to rounding noise of each weight (longer is better)"] = bars
    return found


def _grouped(values: Mapping[str, float]) -> dict[str, float]:
    """Returns values by short names; of many, the least of those in the same place of layers."""
    if len(values) <= _MOST_ROWS:
        return {name.removesuffix("/kernel"): value for name, value in values.items()}
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        groups.setdefault(across_layers(name).removesuffix("/kernel"), []).append(value)
    return {name: min(members) for name, members in groups.items()}


def _tokens(passage: ChangedPassage) -> list[dict[str, object]]:
    """Returns the tokens of a passage with what colors them."""
    return [
        {
            "text": text,
            "rise": rise,
            "kind": "worse" if rise > 0 else "better",
            "strength": round(100 * min(abs(rise) / _FULL, 1.0)),
        }
        for text, rise in zip(passage.tokens, passage.rises, strict=True)
    ]


def _continuations(named: Sequence[tuple[str, Result]]) -> dict[str, list[tuple[str, str]]]:
    """Returns prompts to what each model makes of them; those that say the same are one."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, result in named:
        for prompt, text in result.continuations.items():
            found.setdefault(prompt, {}).setdefault(text, []).append(name)
    return {
        prompt: [(", ".join(names), text) for text, names in told.items()]
        for prompt, told in found.items()
    }


def _attributions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns what each prompt's next token hangs on, in each model, beside the reference."""
    found = []
    for run in runs:
        known = next((r for r in run.results if r.name == run.reference), run.results[0])
        for prompt, first in known.attributions.items():
            rows = [
                {
                    "name": result.name,
                    "tokens": _colored(result.attributions[prompt]),
                    "alike": None
                    if result is known
                    else rank_correlation(first.values, result.attributions[prompt].values),
                }
                for result in run.results
                if prompt in result.attributions
            ]
            found.append({"target": first.target, "rows": rows})
    return found


def _colored(one: Attribution) -> list[dict[str, object]]:
    """Returns the tokens of a prompt with what colors them: the largest has all of its color."""
    most = max(map(abs, one.values)) or 1.0
    return [
        {
            "text": text,
            "value": value,
            "kind": "better" if value > 0 else "worse",
            "strength": round(100 * abs(value) / most),
        }
        for text, value in zip(one.tokens, one.values, strict=True)
    ]


def render_report(runs: Sequence[Run], title: str = "What was measured") -> str:
    """Returns the page.

    Args:
        runs: One or more runs.
        title: What the page is called. Defaults to `"What was measured"`.

    Raises:
        ValueError: If there is no result.
    """
    named = _joined(runs)
    if not named:
        raise ValueError("There are no results to report.")
    template = resources.files("tfgptopt.job").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    texts = {str(run.about.get("text", run.about.get("held-out text"))) for run in runs}
    windows = {str(run.about.get("windows")) for run in runs}
    recipes = [r.training.recipe for r in runs if r.training is not None and r.training.recipe]
    return environment.from_string(template).render(
        title=title,
        lines=[line for run in runs for line in headline(run)],
        warn=len(texts) > 1 or len(windows) > 1,
        headings=HEADINGS,
        rows=[[name, *cells(result)[1:]] for name, result in named],
        named=named,
        counted=any(r.speed.joules_per_token is not None for _, r in named),
        charts=_charts(runs, named),
        bars=_bars(runs),
        weights=_weights(runs),
        passages=[(name, [_tokens(p) for p in r.quality.changed]) for name, r in named
                  if any(abs(p.rise) > _SHOWN for p in r.quality.changed)],
        continuations=_continuations(named),
        attributions=_attributions(runs),
        recipes=[yaml.safe_dump(dict(recipe), sort_keys=False) for recipe in recipes],
        facts=[_facts(run) for run in runs],
    )  # fmt: skip


def _facts(run: Run) -> dict[str, str]:
    """Returns where and on what a run was made."""
    words = {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in run.about.items()
    }
    if run.machine is not None:
        machine = run.machine
        words["machine"] = (
            f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, "
            f"{machine.bandwidth / 1e9:.0f} GB/s from memory"
        )
    return words


def write_report(runs: Sequence[Run], path: Path, title: str = "What was measured") -> None:
    """Writes one self-contained page; a file that is there is replaced, whole or not at all.

    Args:
        runs: One or more runs.
        path: The file to write.
        title: What the page is called. Defaults to `"What was measured"`.

    Raises:
        ValueError: If there is no result, or the file cannot be written.
    """
    page = render_report(runs, title)
    with replacing(path) as temporary:
        temporary.write_text(page, "utf-8")
