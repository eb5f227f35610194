"""Pruning as a technique: its settings, their checks, and what they do to a reloaded model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import keras

from tfgptopt.model import masks
from tfgptopt.model.changing import changing
from tfgptopt.model.targets import (
    Selector,
    Target,
    candidates,
    check_regex,
    grouped,
    regex_for,
    select,
)
from tfgptopt.model.techniques import register_technique
from tfgptopt.model.types import Config
from tfgptopt.pruning.checkpointing import mask_state
from tfgptopt.pruning.patterns import (
    Pattern,
    Unstructured,
    check_pattern,
    check_reaches,
    deserialize_pattern,
    serialize_pattern,
)
from tfgptopt.pruning.regrowth import Regrowth, deserialize_regrowth, serialize_regrowth
from tfgptopt.pruning.schedules import (
    Schedule,
    Threshold,
    Timeline,
    deserialize_schedule,
    final_sparsity,
    serialize_schedule,
)
from tfgptopt.pruning.scores import Magnitude, Movement, Random, Score, Wanda
from tfgptopt.pruning.sparsegpt import SparseGPT
from tfgptopt.pruning.sparsity_allocation import Allocation

_SCORES: dict[str, type[Any]] = {x.name: x for x in (Magnitude, Wanda, Movement, Random, SparseGPT)}


@register_technique
@dataclass(frozen=True)
class Prune:
    """Pruning along a schedule: the one set of settings that all ways to prune are made of.

    The callback `Pruning`, `tfgptopt.prune` and recipes carry it out; a pruned weight knows it.

    Args:
        schedule: A tfmot schedule, or a `Threshold`, in steps of `optimizer.iterations`.
        pattern: Which weights go together. Defaults to `Unstructured()`.
        score: How important a weight is. Its calibration data is not kept in YAML. Defaults to
            `Magnitude()`.
        targets: Selector of the weights; in a recipe a regular expression on their paths. Defaults
            to `None`: all kernels but the head.
        allocation: How the sparsity is spread over weights. Defaults to `None`: evenly.
        regrow: What grows where others go, `RigL()` or `SET()`. Defaults to `None`: nothing.

    Raises:
        ValueError: If a setting is none or out of range, or two do not go together.
    """

    schedule: Schedule
    pattern: Pattern = Unstructured()
    score: Score | SparseGPT = Magnitude()
    targets: Selector | None = None
    allocation: Allocation | None = None
    regrow: Regrowth | None = None

    name: ClassVar[str] = "prune"
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        Timeline(self.schedule)
        check_pattern(self.pattern)
        if not isinstance(self.score, Score | SparseGPT):
            raise ValueError(
                f"`score` must be one of {', '.join(_SCORES)}, such as Magnitude(). "
                f"Received: {self.score!r}"
            )
        if self.regrow is not None and not isinstance(self.regrow, Regrowth):
            raise ValueError(f"`regrow` must be RigL(), SET() or None. Received: {self.regrow!r}")

    def _check_settings(self) -> None:
        """Raises if two settings do not go together."""
        if not self.pattern.supports(self.score.name):
            raise ValueError(
                f"{self.score} cannot prune with {self.pattern}. Use Magnitude(), which any "
                "pattern takes; SparseGPT prunes with Unstructured() or NM."
            )
        alone = self.pattern == Unstructured()
        if isinstance(self.schedule, Threshold):
            together = hasattr(self.pattern, "units") and not self.pattern.takes_allocation
            if not (alone or together) or self.score != Magnitude() or self.allocation is not None:
                raise ValueError(
                    "A Threshold compares magnitudes, each weight with its own: it takes "
                    "Magnitude(), and Unstructured(), Block, Rows or Columns, and no `allocation`. "
                    f"Received: {self.score}, {self.pattern}"
                )
        if self.regrow is not None and (not alone or isinstance(self.schedule, Threshold)):
            raise ValueError(
                f"{self.regrow} moves connections one by one, along a schedule of sparsities: use "
                f"Unstructured(). Received: {self.pattern}, {type(self.schedule).__name__}"
            )

    def check(self, model: keras.Layer) -> list[Target]:
        """Returns the weights of a model that would be pruned, after checking that they can be.

        Raises:
            ValueError: If two settings do not go together, the model is not built, nothing
                matches, or a weight cannot have the pattern or holds values that are not finite.
        """
        self._check_settings()
        self.score.check()
        chosen = select(model, self.targets)
        final = final_sparsity(self.schedule)
        check_reaches(self.pattern, final)
        if self.allocation is not None:
            if not self.pattern.takes_allocation:
                raise ValueError(
                    f"{self.pattern} spreads sparsity by itself: leave out `allocation`."
                )
            self.allocation.check(chosen)
            if final is not None:
                self.allocation.at(final, chosen)
        for target in chosen:
            self.pattern.check(target.parts[0].matrix_shape, target.path)
            if not bool(keras.ops.all(keras.ops.isfinite(target.variable.value))):
                raise ValueError(f"{target.path} has values that are NaN or infinite.")
        return chosen

    def unfinished(self, sparsity: float) -> str | None:
        """Returns what to say where weights with a sparsity are less than the schedule's end."""
        final = final_sparsity(self.schedule)
        if final is None or self.allocation is not None or sparsity > final - 0.02:
            return None
        return (
            f"The weights that were restored are of a step before the pruning schedule ended: a "
            f"weight has sparsity {sparsity:.2f}, and {final:.2f} was to be reached. Restore from "
            "the steps behind the end of the schedule, or train on."
        )

    def to_config(self) -> Config:
        """Returns the technique as plain data.

        Raises:
            ValueError: If `targets` is no regular expression, or the pattern has no name.
        """
        return {
            "name": self.name,
            "schedule": serialize_schedule(self.schedule),
            "pattern": serialize_pattern(self.pattern),
            "score": _score_config(self.score),
            "targets": check_regex(self.targets),
            "allocation": dict(self.allocation.sparsities) if self.allocation else None,
            **({"regrow": serialize_regrowth(self.regrow)} if self.regrow else {}),
        }

    @classmethod
    def from_config(cls, config: Config) -> Prune:
        """Returns the technique that `to_config` wrote. All but the schedule may be missing.

        Raises:
            KeyError: If the schedule is missing.
            ValueError: If a setting is not known or out of range.
        """
        config = dict(config)
        config["schedule"] = deserialize_schedule(config["schedule"])
        if "pattern" in config:
            config["pattern"] = deserialize_pattern(config["pattern"])
        if "score" in config:
            config["score"] = _score_from(config["score"])
        config["regrow"] = deserialize_regrowth(config.get("regrow"))
        if config.get("allocation") is not None:
            config["allocation"] = Allocation(config["allocation"])
        return cls(**config)

    def replay(self, model: keras.Layer) -> None:
        """Holds the zeros that a reloaded model has."""
        chosen = [t for t in select(model, self.targets) if not masks.masked(t.variable)]
        with changing(model):
            masks.attach(model, chosen, self)
            masks.read_from_zeros(chosen)
            mask_state(model).restore()

    @classmethod
    def found_on(cls, model: keras.Layer) -> list[Prune]:
        """Returns how a model is pruned now, one technique for each group of weights."""
        found = [item for item in candidates(model) if isinstance(item, Target)]
        kernels = [target for target in found if target.role == "kernel"]
        pruned = [target for target in found if masks.masked(target.variable)]
        return [
            replace(technique_of(group[0]), targets=regex_for(group, kernels))
            for _, group in grouped(pruned, _settings)
        ]


def _score_config(score: Score | SparseGPT) -> Any:
    """Returns a score as plain data: its name, with a seed that is not the usual one."""
    seed = getattr(score, "seed", 0)
    return {"name": score.name, "seed": seed} if seed else score.name


def _score_from(config: Any) -> Score | SparseGPT:
    """Returns the score that `_score_config` wrote."""
    settings = dict(config) if isinstance(config, dict) else {"name": config}
    name = settings.pop("name", None)
    if name not in _SCORES:
        raise ValueError(f"A score is one of {', '.join(_SCORES)}. Received: {config!r}")
    score: Score | SparseGPT = _SCORES[name](**settings)
    return score


def technique_of(target: Target) -> Prune:
    """Returns how a pruned weight is pruned."""
    technique: Prune = target.variable.constraint.technique
    return technique


def _settings(target: Target) -> tuple[Any, ...]:
    """Returns what two weights of one group have in common."""
    technique = technique_of(target)
    same = technique.schedule, technique.pattern, technique.score, technique.allocation
    return *same, technique.regrow
