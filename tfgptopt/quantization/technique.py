"""Rounding as a technique: its settings, their checks, and what they do to a reloaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.targets import Selector, Target, candidates, check_regex, grouped, regex_for
from tfgptopt.model.techniques import register_technique
from tfgptopt.model.types import Config
from tfgptopt.quantization import layers
from tfgptopt.quantization.aware import (
    check_setting,
    chosen_specs,
    keep_found_scales,
    quantize_aware,
)
from tfgptopt.quantization.bit_allocation import BitAllocation
from tfgptopt.quantization.post_training import Method, needs_data, reorders
from tfgptopt.quantization.specs import Spec, deserialize_spec, serialize_spec


@register_technique
@dataclass(frozen=True)
class QuantizeAware:
    """Rounding in training: the settings that the callback and recipes are made of.

    Args:
        spec: `Int8()` or `Int4()`, or what `tfgptopt.quantization.allocate` returned.
        targets: Selector of the weights; in a recipe a regular expression on their paths. Defaults
            to `None`: kernels and embedding tables.
        start_step: int. Value of `optimizer.iterations` from which on to round. Defaults to `0`.
        freeze_step: int. Value of `optimizer.iterations` from which on scales stay as they are.
            Defaults to `None`: never.
        method: How weights are rounded where rounding begins: a method of `tfgptopt.quantize`, or
            several, but for rotation and sorting. Defaults to `"rtn"`.

    Raises:
        ValueError: If `spec` is no quantization spec, a step is out of range, or there is no such
            method.
    """

    spec: Spec | BitAllocation
    targets: Selector | None = None
    start_step: int = 0
    freeze_step: int | None = None
    method: Method | Sequence[Method] = "rtn"

    name: ClassVar[str] = "quantize_aware"
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_setting(self.spec)
        first, last = self.start_step, self.freeze_step
        if not isinstance(first, int) or first < 0:
            raise ValueError(f"`start_step` must be an int >= 0. Received: {first!r}")
        if last is not None and (not isinstance(last, int) or last < first):
            raise ValueError(
                f"`freeze_step` must be None or an int >= `start_step`. Received: {last!r}"
            )
        if not isinstance(self.method, str):
            object.__setattr__(self, "method", tuple(self.method))
        if reorders(self.method):
            raise ValueError(
                "Rotation and sorting change weights that an optimizer knows already: they come "
                "before `fit`, as `Rotate` or `tfgptopt.quantization.sort_neurons`. Received: "
                f"method={self.method!r}"
            )

    @property
    def needs_data(self) -> bool:
        """Whether the method reads calibration data."""
        return needs_data(self.method)

    def check(self, model: keras.Layer) -> list[tuple[Target, Spec]]:
        """Returns the weights of a model that would be rounded, each with its spec.

        Raises:
            ValueError: If nothing matches, or a weight does not fit its spec.
        """
        return chosen_specs(model, self.spec, self.targets)

    def to_config(self) -> Config:
        """Returns the technique as plain data.

        Raises:
            ValueError: If `targets` is no regular expression.
        """
        return {
            "name": self.name,
            "spec": _serialize(self.spec),
            "targets": check_regex(self.targets),
            "start_step": self.start_step,
            "freeze_step": self.freeze_step,
            "method": self.method if isinstance(self.method, str) else list(self.method),
        }

    @classmethod
    def from_config(cls, config: Config) -> QuantizeAware:
        """Returns the technique that `to_config` wrote. All but the spec may be missing.

        Raises:
            KeyError: If the spec is missing.
            ValueError: If a setting is not known or out of range.
        """
        return cls(**{**config, "spec": _deserialize(config["spec"])})

    def replay(self, model: keras.Layer) -> None:
        """Makes a reloaded model round again, on the grid that its weights lie on, if on one."""
        quantize_aware(model, self.spec, self.targets)
        with strategy_scope(model):
            keep_found_scales(model, self.targets)

    @classmethod
    def found_on(cls, model: keras.Layer) -> list[QuantizeAware]:
        """Returns how a model rounds now, one technique for each group of weights.

        It says how the model is dressed, so `start_step` is 0 in it.
        """
        found = [item for item in candidates(model) if isinstance(item, Target)]
        rounded = [target for target in found if layers.is_dressed(target.layer)]
        groups = grouped(rounded, lambda target: target.layer.quantization_spec)
        return [cls(spec, regex_for(group, found)) for spec, group in groups]


def _serialize(spec: Spec | BitAllocation) -> Config:
    if not isinstance(spec, BitAllocation):
        return serialize_spec(spec)
    specs = {path: one and serialize_spec(one) for path, one in spec.specs.items()}
    return {"name": "allocation", "specs": specs}


def _deserialize(config: Any) -> Spec | BitAllocation:
    if isinstance(config, Mapping) and config.get("name") == "allocation":
        specs = dict(config.get("specs") or {})
        return BitAllocation({path: one and deserialize_spec(one) for path, one in specs.items()})
    return deserialize_spec(config)
