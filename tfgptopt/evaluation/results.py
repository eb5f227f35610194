"""Results in a file, so that several runs can be compared: written, checked, read again."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfgptopt.evaluation.distributions import Distribution
from tfgptopt.evaluation.explain import Attribution
from tfgptopt.evaluation.machine import Machine
from tfgptopt.evaluation.quality import Quality
from tfgptopt.evaluation.size import Size
from tfgptopt.evaluation.speed import Speed
from tfgptopt.evaluation.tasks import Score
from tfgptopt.file.replacing import replacing

SCHEMA = 2


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        name: What it is called in tables.
        size: Parameters, zeros, bytes.
        quality: What it makes of the held-out text.
        speed: Time to the first token and tokens per second.
        tasks: Names of tasks to what it reached in them.
        continuations: Prompts to what it makes of them, greedily.
        attributions: Prompts to how much each token speaks for the reference's next one.
    """

    name: str
    size: Size
    quality: Quality
    speed: Speed
    tasks: Mapping[str, Score] = field(default_factory=dict)
    continuations: Mapping[str, str] = field(default_factory=dict)
    attributions: Mapping[str, Attribution] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Negative log-likelihood per held-out token, in nats."""
        return self.quality.loss

    @property
    def perplexity(self) -> float:
        """Perplexity on the held-out text."""
        return self.quality.perplexity


@dataclass(frozen=True)
class Training:
    """What a job did to a model, beside the measurements.

    Attributes:
        curves: Names of runs to `(step, loss, sparsity)`.
        sparsity: Paths of weights to their share of zeros.
        noise: Paths of rounded weights to their ratio of signal to noise, in dB: 6 dB more are half
            the error.
        weights: Places in layers to how the weights there lay before and after.
        recipe: The techniques, as `Recipe.to_config` gives them.
        bigram_loss: Held-out loss of a bigram model, in nats per token, or `None`.
    """

    curves: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    sparsity: Mapping[str, float] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Distribution] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    bigram_loss: float | None = None


@dataclass(frozen=True)
class Run:
    """What one run measured.

    Attributes:
        results: Of each artifact.
        reference: Name of the one that the others were compared with, or `None`.
        about: Facts in words, such as the text and its windows.
        machine: Where it was measured, or `None`.
        training: What a job did before, or `None`.
        schema: Version of the file's fields.
    """

    results: tuple[Result, ...]
    reference: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    machine: Machine | None = None
    training: Training | None = None
    schema: int = SCHEMA


def as_plain(run: Run) -> dict[str, Any]:
    """Returns a run as JSON has it. Perplexities stand beside the losses that they come from."""
    plain = dataclasses.asdict(run)
    for row, result in zip(plain["results"], run.results, strict=True):
        row["quality"] = {"perplexity": result.perplexity, **row["quality"]}
    return plain


def save_results(
    run: Run | Sequence[Result], path: str | Path, about: Mapping[str, Any] | None = None
) -> None:
    """Writes results as JSON; a file that is there is replaced.

    Args:
        run: A `Run`, or what `evaluate` gave.
        path: The file.
        about: Facts in words, such as the text. Defaults to `None`.

    Example:

    ```python
    from tfgptopt.evaluation.results import load_results, save_results

    save_results(tfgptopt.evaluate({"gpt": gpt}, validation, new_tokens=2, runs=1), "results.json")
    print(load_results("results.json").results[0].perplexity)
    ```
    """
    whole = run if isinstance(run, Run) else Run(tuple(run), about=about or {})
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(as_plain(whole), indent=1) + "\n", "utf-8")


def load_results(path: str | Path) -> Run:
    """Reads what `save_results`, `tfgptopt evaluate --json` or a job wrote.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, has another version of the fields, or lacks one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        plain = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON: {error}") from None
    version = plain.get("schema") if isinstance(plain, dict) else None
    if version != SCHEMA:
        raise ValueError(
            f"'{path}' has results of schema {version}; this tfgptopt reads schema {SCHEMA}. "
            "Measure again with `tfgptopt evaluate --json`."
        )
    for row in plain.get("results") or []:
        row.get("quality", {}).pop("perplexity", None)  # The loss says it.
    return typing.cast(Run, from_plain(Run, plain, str(path)))


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """Returns what plain data say, as the type of a field has it; fields left out are their
    defaults.

    Args:
        kind: A dataclass, a tuple, mapping or union of those, or a plain type.
        value: What JSON has of it.
        where: What an error message calls it.

    Raises:
        ValueError: If it is of another type, or lacks or has a field that is none.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints, names = typing.get_type_hints(kind), value if isinstance(value, dict) else {}
        fields = {f.name: f for f in dataclasses.fields(kind)}
        lacking = [n for n, f in fields.items() if n not in names and _is_required(f)]
        if lacking or set(names) - set(fields) or not isinstance(value, dict):
            raise ValueError(
                f"{where}: expected the fields {', '.join(fields)}. Received: "
                f"{', '.join(names) or value!r}"
            )
        made = {n: from_plain(hints[n], v, f"{where}, {n}") for n, v in names.items()}
        return kind(**made)  # type: ignore[operator]
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return from_plain(kind, value, where)
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(from_plain(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif origin is not None and origin is not tuple and isinstance(value, dict):
        return {k: from_plain(args[1], v, f"{where}, {k}") for k, v in value.items()}
    elif kind is Any or isinstance(value, (int, float) if kind is float else kind):
        return value
    raise ValueError(f"{where}: expected {kind}. Received: {value!r}")


def _is_required(one: Any) -> bool:
    missing = dataclasses.MISSING
    return one.default is missing and one.default_factory is missing
