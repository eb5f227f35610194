"""A recipe: the ordered techniques that were or will be applied to a model, as data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import yaml

from tfgptopt.distillation.technique import Distill
from tfgptopt.model import masks
from tfgptopt.model.changing import retrace, strategy_scope
from tfgptopt.model.targets import Target, candidates, select
from tfgptopt.pruning.checkpointing import mask_state
from tfgptopt.pruning.patterns import Pattern, Unstructured, check_pattern
from tfgptopt.pruning.schedules import Timeline, deserialize_schedule, serialize_schedule
from tfgptopt.pruning.scores import Magnitude
from tfgptopt.pruning.serializing import (
    deserialize_pattern,
    deserialize_score,
    serialize_pattern,
    serialize_score,
)
from tfgptopt.pruning.sparsity_allocation import Allocation
from tfgptopt.pruning.technique import Settings
from tfgptopt.quantization.aware import keep_found_scales, quantize_aware
from tfgptopt.quantization.layers import is_dressed
from tfgptopt.quantization.specs import Spec, check_spec, deserialize_spec, serialize_spec
from tfgptopt.shrinking.technique import Shrink

# Where `finalize` leaves the recipe on a model.
FINALIZED_RECIPE = "_tfgptopt_recipe"


def _check_targets(targets: Any) -> None:
    if targets is not None and not isinstance(targets, str):
        raise ValueError(f"`targets` of a recipe is a regular expression. Received: {targets!r}")


@dataclass(frozen=True)
class Prune:
    """Pruning along a schedule.

    Args:
        schedule: A tfmot schedule, in steps of `optimizer.iterations`.
        pattern: Which weights go together. Defaults to `Unstructured()`.
        score: How important a weight is. Its calibration data is not kept in YAML. Defaults to
            `Magnitude()`.
        targets: Regular expression on the paths of weights. Defaults to `None`: all kernels but
            the head.
        allocation: How the sparsity is spread over weights. Defaults to `None`: evenly.

    Raises:
        ValueError: If a setting is none or out of range.
    """

    schedule: Any
    pattern: Pattern = Unstructured()
    score: Any = Magnitude()
    targets: str | None = None
    allocation: Allocation | None = None

    def __post_init__(self) -> None:
        Timeline(self.schedule)
        check_pattern(self.pattern)
        serialize_score(self.score)
        _check_targets(self.targets)

    def to_config(self) -> dict[str, Any]:
        """Returns the technique as plain data."""
        return {
            "name": "prune",
            "schedule": serialize_schedule(self.schedule),
            "pattern": serialize_pattern(self.pattern),
            "score": serialize_score(self.score),
            "targets": self.targets,
            "allocation": dict(self.allocation.sparsities) if self.allocation else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Prune:
        """Returns the technique that `to_config` wrote. All but the schedule may be missing."""
        config = dict(config)
        config["schedule"] = deserialize_schedule(config["schedule"])
        if "pattern" in config:
            config["pattern"] = deserialize_pattern(config["pattern"])
        if "score" in config:
            config["score"] = deserialize_score(config["score"])
        if config.get("allocation") is not None:
            config["allocation"] = Allocation(config["allocation"])
        return cls(**config)

    def replay(self, model: keras.Layer) -> None:
        """Holds the zeros that a reloaded model has."""
        targets = [t for t in select(model, self.targets) if not masks.masked(t.variable)]
        with strategy_scope(model):
            settings = Settings(self.schedule, self.pattern, self.score, self.allocation)
            masks.attach(model, targets, settings)
            masks.read_from_zeros(targets)
            mask_state(model).restore()
        retrace(model)


@dataclass(frozen=True)
class QuantizeAware:
    """Quantization-aware training.

    Args:
        spec: `Int8()` or `Int4()`.
        targets: Regular expression on the paths of weights. Defaults to `None`: kernels and
            embedding tables.
        start_step: int. Value of `optimizer.iterations` from which on to round. Defaults to `0`.
        freeze_step: int. Value of `optimizer.iterations` from which on scales stay as they are.
            Defaults to `None`: never.

    Raises:
        ValueError: If `spec` is no quantization spec, or a step is out of range.
    """

    spec: Spec
    targets: str | None = None
    start_step: int = 0
    freeze_step: int | None = None

    def __post_init__(self) -> None:
        check_spec(self.spec)
        _check_targets(self.targets)
        if not isinstance(self.start_step, int) or self.start_step < 0:
            raise ValueError(f"`start_step` must be an int >= 0. Received: {self.start_step!r}")
        last = self.freeze_step
        if last is not None and (not isinstance(last, int) or last < self.start_step):
            raise ValueError(f"`freeze_step` must be >= `start_step`. Received: {last!r}")

    def to_config(self) -> dict[str, Any]:
        """Returns the technique as plain data."""
        return {
            "name": "quantize_aware",
            "spec": serialize_spec(self.spec),
            "targets": self.targets,
            "start_step": self.start_step,
            "freeze_step": self.freeze_step,
        }

    def replay(self, model: keras.Layer) -> None:
        """Makes a reloaded model round again, on the grid that its weights lie on, if on one."""
        quantize_aware(model, self.spec, self.targets)
        with strategy_scope(model):
            keep_found_scales(model, self.targets)


Technique = Shrink | Distill | Prune | QuantizeAware
# By names in YAML, in the order in which they have to come.
_KINDS: dict[str, Any] = {
    "shrink": Shrink,
    "distill": Distill,
    "prune": Prune,
    "quantize_aware": QuantizeAware,
}


def _technique_from(config: Any) -> Technique:
    if not isinstance(config, dict) or config.get("name") not in _KINDS:
        raise ValueError(
            f"A technique is a mapping with the name {', '.join(list(_KINDS)[:-1])} or "
            f"quantize_aware. Received: {config!r}"
        )
    fields = {key: value for key, value in config.items() if key != "name"}
    try:
        if config["name"] in ("shrink", "distill", "prune"):
            found: Technique = _KINDS[config["name"]].from_config(fields)
            return found
        return QuantizeAware(deserialize_spec(fields.pop("spec")), **fields)
    except KeyError as error:
        raise ValueError(f"The technique {config['name']} needs the field {error}.") from None
    except TypeError as error:
        raise ValueError(f"The technique {config['name']}: {error}") from None


def _stage(technique: Technique) -> int:
    return 0 if isinstance(technique, Shrink) else 1 if isinstance(technique, Distill) else 2


@dataclass(frozen=True)
class Recipe:
    """An ordered list of techniques; to and from YAML; replayed when a model is reloaded.

    KerasHub rebuilds plain layers when it loads a model. Save the recipe beside the weights:

    ```python
    from tfgptopt import Recipe
    from tfgptopt.recipe.recipe import QuantizeAware

    Recipe((QuantizeAware(Int8()),)).save("recipe.yaml")
    model = keras_hub.models.CausalLM.from_preset("small_gpt")
    Recipe.load("recipe.yaml").replay(model)
    ```

    Args:
        techniques: `Shrink`, `Distill`, `Prune` and `QuantizeAware`, in the order of their
            application, each once for the same targets.

    Raises:
        ValueError: If something else is in the list, or a technique is there twice.
    """

    techniques: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "techniques", tuple(self.techniques))
        for technique in self.techniques:
            if not isinstance(technique, Technique):
                raise ValueError(f"Not a technique: {technique!r}")
        stages = [_stage(technique) for technique in self.techniques]
        if stages != sorted(stages):
            raise ValueError(
                "A recipe shrinks first, then distills, then prunes and rounds. Received: "
                f"{', '.join(type(technique).__name__ for technique in self.techniques)}"
            )
        kinds = [
            (type(technique).__name__, getattr(technique, "targets", None))
            for technique in self.techniques
        ]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                "A recipe holds each technique once for the same targets. Received: "
                f"{', '.join(kind for kind, _ in kinds)}"
            )

    @property
    def in_fit(self) -> Recipe:
        """The part that callbacks of `fit` carry out: pruning and rounding."""
        return Recipe(tuple(t for t in self.techniques if isinstance(t, Prune | QuantizeAware)))

    def to_config(self) -> dict[str, Any]:
        """Returns the recipe as plain data."""
        return {"techniques": [technique.to_config() for technique in self.techniques]}

    @classmethod
    def from_config(cls, config: Any) -> Recipe:
        """Returns the recipe that `to_config` wrote.

        Raises:
            ValueError: If a field is missing, unknown or out of range.
        """
        if not isinstance(config, dict) or not isinstance(config.get("techniques"), list):
            raise ValueError(
                f"A recipe is a mapping with a list of techniques. Received: {config!r}"
            )
        return cls(tuple(_technique_from(item) for item in config["techniques"]))

    def save(self, path: str | Path) -> None:
        """Writes the recipe as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_config(), sort_keys=False), "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a recipe from YAML.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no valid YAML or no valid recipe.
        """
        try:
            return cls.from_config(yaml.safe_load(Path(path).read_text("utf-8")))
        except (yaml.YAMLError, ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"'{path}' is no valid recipe: {error}") from None

    def replay(self, model: keras.Layer) -> keras.Layer:
        """Dresses a reloaded model as it was when it was saved.

        Args:
            model: A model with the weights of a run that used this recipe.

        Returns:
            The same model.
        """
        for technique in self.techniques:
            technique.replay(model)
        return model


def _selector_for(chosen: list[Target], default: list[Target]) -> str | None:
    """Returns the regular expression that selects exactly `chosen`, or `None` for the default."""
    if [t.path for t in chosen] == [t.path for t in default]:
        return None
    return "^(?:" + "|".join(re.escape(target.path) for target in chosen) + ")$"


def _groups(targets: list[Target], key: Callable[[Target], Any]) -> list[tuple[Any, list[Target]]]:
    """Returns targets grouped by a key, in the order in which the keys appear."""
    groups: list[tuple[Any, list[Target]]] = []
    for target in targets:
        value = key(target)
        members = next((members for known, members in groups if known == value), None)
        if members is None:
            groups.append((value, [target]))
        else:
            members.append(target)
    return groups


def recipe_of(model: keras.Layer) -> Recipe | None:
    """Returns the recipe of a dressed or finalized model, or `None` for a plain one.

    It says how the model is dressed now, so the `start_step` of rounding is 0 in it.
    """
    found = [target for target in candidates(model) if isinstance(target, Target)]
    kernels = [target for target in found if target.role == "kernel"]
    pruned = [target for target in found if masks.masked(target.variable)]
    rounded = [target for target in found if is_dressed(target.layer)]
    techniques: list[Technique] = [
        Prune(s.schedule, s.pattern, s.score, _selector_for(group, kernels), s.allocation)
        for s, group in _groups(pruned, lambda t: t.variable.constraint.settings)
    ]
    techniques += [
        QuantizeAware(spec, _selector_for(group, found))
        for spec, group in _groups(rounded, lambda t: t.layer.quantization_spec)
    ]
    earlier: Recipe | None = getattr(model, FINALIZED_RECIPE, None)
    if earlier is not None:
        now = [(type(t), getattr(t, "targets", None)) for t in techniques]
        techniques[:0] = [
            t for t in earlier.techniques if (type(t), getattr(t, "targets", None)) not in now
        ]
    return Recipe(tuple(techniques)) if techniques else None
