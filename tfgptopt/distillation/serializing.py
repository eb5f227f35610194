"""Losses as plain data, for recipes."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from tfgptopt.distillation.features import AttentionMaps, HiddenStates
from tfgptopt.distillation.losses import HardLabels, LogitsKL, Loss
from tfgptopt.model.types import Config

_CLASSES: dict[str, Any] = {
    "logits_kl": LogitsKL,
    "hard_labels": HardLabels,
    "hidden_states": HiddenStates,
    "attention_maps": AttentionMaps,
}


def serialize_loss(loss: Loss) -> Config:
    """Returns a loss as plain data.

    Raises:
        ValueError: If it is none of this package's, or its weight is a function.
    """
    if type(loss) not in _CLASSES.values():
        raise ValueError(f"A recipe holds losses of tfgptopt.distillation. Received: {loss!r}")
    fields = {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)}  # type: ignore[arg-type]
    weight = fields["weight"]
    if isinstance(weight, keras.optimizers.schedules.LearningRateSchedule):
        fields["weight"] = keras.optimizers.schedules.serialize(weight)
    elif callable(weight):
        raise ValueError(
            "A recipe cannot hold a function as a weight. Use a number, or a keras "
            f"LearningRateSchedule. Received: {loss!r}"
        )
    if fields.get("layers") is not None:
        fields["layers"] = dict(fields["layers"])
    return {"name": loss.name, **fields}


def is_serializable(loss: Loss) -> bool:
    """Returns whether `serialize_loss` can write a loss."""
    schedule = isinstance(loss.weight, keras.optimizers.schedules.LearningRateSchedule)
    return type(loss) in _CLASSES.values() and (schedule or not callable(loss.weight))


def deserialize_loss(config: Any) -> Loss:
    """Returns the loss that `serialize_loss` wrote. All but the name may be missing.

    Raises:
        ValueError: If the name or a field is not known.
    """
    name = config.get("name") if isinstance(config, dict) else None
    if name not in _CLASSES:
        raise ValueError(f"A loss is named {', '.join(_CLASSES)}. Received: {config!r}")
    fields = {key: value for key, value in config.items() if key != "name"}
    if isinstance(fields.get("weight"), dict):
        fields["weight"] = keras.optimizers.schedules.deserialize(fields["weight"])
    try:
        loss: Loss = _CLASSES[name](**fields)
    except TypeError as error:
        raise ValueError(f"Unknown setting for {name}: {error}") from None
    return loss
