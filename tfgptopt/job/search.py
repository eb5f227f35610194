"""Which recipe meets limits of size, speed and quality: a search from cheap to dear.

It knows nothing of models: what measures a candidate is given, so that recorded results search in
seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Of the candidates that train, the share that goes on to more steps.
_KEPT = 1 / 3
# Speeds vary: a candidate is only given up for one that was slower than this share of the limit.
_TOO_SLOW = 0.7


@dataclass(frozen=True)
class Limits:
    """What a file has to meet; `None` for no limit.

    Attributes:
        max_size: Most bytes of the file.
        max_download: Most bytes of the file under gzip.
        min_speed: Least tokens per second.
        max_rise: Most rise of perplexity, as a share of the float model's.
    """

    max_size: int | None = None
    max_download: int | None = None
    min_speed: float | None = None
    max_rise: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_size", "max_download", "min_speed"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive. Received: {value!r}")
        if self.max_rise is not None and not self.max_rise > -1:
            raise ValueError(f"`max_rise` must be above -1. Received: {self.max_rise!r}")

    def excess(self, trial: Trial) -> dict[str, float]:
        """Returns by how much a trial misses each limit that it misses: 0.1 is ten percent."""
        if trial.error is not None:
            return {"failed": float("inf")}
        found = {}
        for name, value, limit in (
            ("size", trial.size, self.max_size),
            ("download", trial.download, self.max_download),
        ):
            if limit is not None and value > limit:
                found[name] = value / limit - 1
        if self.min_speed is not None and trial.speed < self.min_speed:
            found["speed"] = self.min_speed / max(trial.speed, 1e-9) - 1
        if self.max_rise is not None and trial.rise > self.max_rise:
            found["rise"] = (1 + trial.rise) / (1 + self.max_rise) - 1
        return found


@dataclass(frozen=True)
class Candidate:
    """What may be done to a model.

    Attributes:
        name: What it is called.
        tier: How dear it is: 0 without data, 1 with calibration data, 2 with training, 3 with a
            smaller shape and a teacher.
        spec: Number type of the weights, as `--spec` has it.
        method: Of post-training quantization; not used where it trains.
        sparsity: Share of weights to prune.
        depth, feedforward: Shares of layers and neurons to keep.
    """

    name: str
    tier: int
    spec: str
    method: str = "auto"
    sparsity: float = 0.0
    depth: float = 1.0
    feedforward: float = 1.0

    @property
    def trains(self) -> bool:
        """Whether it trains."""
        return self.tier >= 2

    @property
    def shape(self) -> tuple[str, float, float]:
        """What decides size and speed of its file."""
        return (self.spec, self.depth, self.feedforward)


@dataclass(frozen=True)
class Trial:
    """What was measured of a candidate's file.

    Attributes:
        name: Of the candidate.
        steps: Steps that it was trained, or 0.
        seconds: What carrying it out and measuring it took.
        size, download: Bytes of the file, and under gzip.
        speed: Tokens per second.
        rise: Of perplexity, as a share of the float model's.
        error: Why it failed, or `None`.
    """

    name: str
    steps: int = 0
    seconds: float = 0.0
    size: int = 0
    download: int = 0
    speed: float = 0.0
    rise: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        trials: All of them, in their order.
        kept: The one to keep: of those that meet the limits, that with the smallest rise; else the
            nearest to the limits; `None` if all failed.
        misses: By how much it misses each limit that it misses; empty if it meets all.
        front: Trials that no other one beats in size, speed and rise at once.
        skipped: Names of candidates that were not tried to the reasons.
    """

    trials: tuple[Trial, ...]
    kept: Trial | None
    misses: dict[str, float]
    front: tuple[Trial, ...]
    skipped: dict[str, str]


@dataclass(eq=False)
class _Search:
    limits: Limits
    budget: float
    measure: Callable[[Candidate, int], Trial]
    known: dict[tuple[str, int], Trial]
    trials: list[Trial] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    spent: float = 0.0

    def run(self, candidate: Candidate, steps: int, like: dict[int, float]) -> Trial | None:
        """Returns the trial of a candidate, measured or known; `None` where time is up."""
        trial = self.known.get((candidate.name, steps))
        if trial is None:
            expected = like.get(candidate.tier, 0.0) * max(steps, 1)
            if self.spent + expected > self.budget:
                self.skipped[candidate.name] = (
                    f"{self.spent + expected:.0f} s would pass the budget of {self.budget:.0f} s"
                )
                return None
            trial = self.measure(candidate, steps)
        self.trials.append(trial)
        self.spent += trial.seconds
        like[candidate.tier] = trial.seconds / max(steps, 1)
        return trial

    def hopeless(self, candidate: Candidate, shapes: dict[object, Trial]) -> str | None:
        """Returns why a candidate cannot meet the limits, as another one of its shape shows."""
        other = shapes.get(candidate.shape)
        if other is None or other.error is not None:
            return None
        missed = self.limits.excess(other)
        if "size" in missed:
            return f"its file is as large as that of {other.name}"
        if missed.get("speed", 0.0) > 1 / _TOO_SLOW - 1:
            return f"it is as slow as {other.name}"
        return None


def search(
    candidates: Sequence[Candidate],
    measure: Callable[[Candidate, int], Trial],
    limits: Limits,
    budget_seconds: float,
    steps: Sequence[int] = (60, 180, 540),
    known: Sequence[Trial] = (),
) -> Found:
    """Tries candidates from cheap to dear, until those of a tier meet the limits.

    Those that train do so by successive halving: all of a tier for a few steps, the best third for
    three times as many, and so on. Candidates whose file cannot be small or fast enough, as another
    one of the same shape showed, are passed over; so are those that fail.

    Args:
        candidates: What to try.
        measure: Carries out a candidate for so many steps, and measures it; a failure is a trial
            with `error`.
        limits: What has to be met.
        budget_seconds: float. Seconds that all trials may take, those that are known included.
        steps: Steps of training, in rising order. Defaults to `(60, 180, 540)`.
        known: Trials of a search that was stopped, which are not measured again. Defaults to none.

    Returns:
        `Found`.

    Raises:
        ValueError: If there are no candidates, or two of one name.

    Reference: Jamieson and Talwalkar, 2016, "Non-stochastic Best Arm Identification and
        Hyperparameter Optimization".
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Candidates need names that differ. Received: {names}")
    memory = {(trial.name, trial.steps): trial for trial in known}
    state = _Search(limits, budget_seconds, measure, memory)
    shapes: dict[object, Trial] = {}
    like: dict[int, float] = {}
    for tier in sorted({candidate.tier for candidate in candidates}):
        members = [c for c in candidates if c.tier == tier]
        for rung in steps if tier >= 2 else (0,):
            found: list[tuple[Candidate, Trial]] = []
            for candidate in members:
                reason = state.hopeless(candidate, shapes)
                if reason is not None:
                    state.skipped.setdefault(candidate.name, reason)
                    continue
                trial = state.run(candidate, rung, like)
                if trial is not None and trial.error is None:
                    shapes.setdefault(candidate.shape, trial)
                    found.append((candidate, trial))
            found.sort(key=lambda pair: _rank(limits, pair[1]))
            members = [candidate for candidate, _ in found[: max(1, round(len(found) * _KEPT))]]
            if _meets(limits, state.trials):
                break
        if _meets(limits, state.trials):
            break
    return _found(state)


def _meets(limits: Limits, trials: Sequence[Trial]) -> bool:
    return any(not limits.excess(trial) for trial in trials)


def _rank(limits: Limits, trial: Trial) -> tuple[float, float]:
    """Returns what trials are sorted by: the worst miss of a limit, then the rise."""
    return (max(limits.excess(trial).values(), default=0.0), trial.rise)


def _found(state: _Search) -> Found:
    tried = [trial for trial in state.trials if trial.error is None]
    kept = min(tried, key=lambda trial: _rank(state.limits, trial), default=None)
    front = tuple(
        trial
        for trial in tried
        if not any(_beats(other, trial) for other in tried if other is not trial)
    )
    misses = {} if kept is None else state.limits.excess(kept)
    names = {trial.name for trial in state.trials}
    skipped = {name: why for name, why in state.skipped.items() if name not in names}
    return Found(tuple(state.trials), kept, misses, front, skipped)


def _beats(one: Trial, other: Trial) -> bool:
    """Returns whether a trial is as good as another one in all, and better in something."""
    pairs = ((one.size, other.size), (one.download, other.download), (one.rise, other.rise),
             (-one.speed, -other.speed))  # fmt: skip
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
