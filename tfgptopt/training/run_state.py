"""What a training run is besides its weights: what makes it the same run, and its random state."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.backend.common.global_state import get_global_attribute

from tfgptopt.model.types import Config
from tfgptopt.training.kept_weights import give_back, kept_weights

_STATE = "state.npz"
# Of Keras' own callbacks, what they remember from epoch to epoch.
_REMEMBERED = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")


def _plain(value: Any) -> Any:
    """Returns a configuration as JSON has it; what JSON cannot hold by the name of its class."""

    def other(x: Any) -> Any:
        return float(x) if isinstance(x, np.number) else type(x).__name__

    return json.loads(json.dumps(value, default=other, sort_keys=True))


def identity_of(
    model: keras.Model, callbacks: Sequence[keras.callbacks.Callback], steps: int | None
) -> Config:
    """Returns what has to be the same for a training to go on from a checkpoint.

    Args:
        model: A compiled, built model.
        callbacks: Those of its `fit`.
        steps: Batches of an epoch, if they are known.

    Returns:
        Words for messages, to plain data.
    """
    weights = [f"{v.name} {tuple(v.shape)} {v.dtype}" for v in model.weights]
    optimizer = _without_names(keras.saving.serialize_keras_object(model.optimizer))
    techniques = [one.technique for one in callbacks if hasattr(one, "technique")]
    techniques += list(getattr(model, "distillation_losses", []))
    return {
        "model": [type(model).__name__, *weights],
        "optimizer": _plain(optimizer),
        "recipe": _plain([_settings(one) for one in techniques]),
        "number of steps in an epoch": [steps, model.steps_per_execution],
        "teacher": _checksum(getattr(getattr(model, "teacher", None), "model", None)),
    }


def _checksum(teacher: keras.Model | None) -> int | None:
    """Returns a checksum of the weights of a teacher, which no checkpoint holds."""
    if teacher is None:
        return None
    found = 0
    for variable in teacher.weights:
        found = zlib.crc32(_number(variable).tobytes(), found)
    return found


def _without_names(config: Any) -> Any:
    """Returns a configuration without names, which Keras counts up within a process."""
    if isinstance(config, dict):
        return {key: _without_names(value) for key, value in config.items() if key != "name"}
    return [_without_names(one) for one in config] if isinstance(config, list) else config


def _settings(technique: Any) -> Any:
    """Returns the settings of a technique or a loss, as far as they are plain data."""
    if not hasattr(technique, "to_config"):
        # A function among them has no name that another process knows.
        return [type(technique).__name__, *sorted(map(_word, vars(technique).items()))]
    try:
        return technique.to_config()
    except ValueError:
        return type(technique).__name__


def _word(item: tuple[str, Any]) -> str:
    name, value = item
    return f"{name}={type(value).__name__ if callable(value) else value}"


def difference(mine: Config, saved: Config) -> str | None:
    """Returns in words what differs between two identities, or `None`."""
    for what, value in mine.items():
        if saved.get(what) != value:
            one, other = _first_difference(value, saved.get(what))
            return f"another {what}. Received: {one}. In the checkpoint: {other}"
    return None


def _first_difference(one: Any, other: Any) -> tuple[Any, Any]:
    """Returns the innermost parts that differ, of which messages speak."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key))
    if isinstance(one, list) and isinstance(other, list):
        for a, b in zip(one, other, strict=False):
            if a != b:
                return _first_difference(a, b)
        return f"{len(one)} entries", f"{len(other)} entries"
    return one, other


def seed_states(model: keras.Model) -> list[Any]:
    """Returns the states of what draws random numbers for a model: dropout, samplers, Keras."""
    known = {id(variable) for variable in model.weights}
    states = [variable for variable in model.variables if id(variable) not in known]
    generators = [
        getattr(getattr(model, "sampler", None), "seed_generator", None),
        get_global_attribute("global_seed_generator"),
    ]
    return states + [generator.state for generator in generators if generator is not None]


def gather_state(
    model: keras.Model, callbacks: Sequence[keras.callbacks.Callback]
) -> dict[str, np.ndarray]:
    """Returns random state, metrics and weights that callbacks keep, by names.

    All workers have to call it together.
    """
    arrays = kept_weights(callbacks)
    arrays |= {f"seed_{i}": _number(v) for i, v in enumerate(seed_states(model))}
    arrays |= {f"metric_{i}": value for i, value in enumerate(metric_values(model))}
    version, words, gauss = random.getstate()
    arrays["python"] = np.array(words, np.uint32)
    arrays["python_rest"] = np.array([version, np.nan if gauss is None else gauss])
    _, key, place, has_gauss, cached = np.random.get_state()
    arrays |= {"numpy": np.asarray(key), "numpy_rest": np.array([place, has_gauss, cached])}
    return arrays


def write_state(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes what `gather_state` returned into a folder."""
    np.savez(path / _STATE, **arrays)  # type: ignore[arg-type]


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_state` wrote."""
    with np.load(path / _STATE) as found:
        return dict(found)


def restore_random(model: keras.Model, arrays: dict[str, np.ndarray]) -> None:
    """Gives everything random its state back."""
    for i, state in enumerate(seed_states(model)):
        if f"seed_{i}" in arrays:
            state.assign(arrays[f"seed_{i}"])
    version, gauss = arrays["python_rest"].tolist()
    words = tuple(arrays["python"].tolist())
    random.setstate((int(version), words, None if np.isnan(gauss) else gauss))
    place, has_gauss, cached = arrays["numpy_rest"].tolist()
    np.random.set_state(("MT19937", arrays["numpy"], int(place), int(has_gauss), cached))


def saved_metrics(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Returns the metrics that `gather_state` returned."""
    return [arrays[f"metric_{i}"] for i in range(len(arrays)) if f"metric_{i}" in arrays]


def metric_values(model: keras.Model) -> list[np.ndarray]:
    """Returns the metrics of an epoch so far."""
    return [_number(variable) for variable in model.metrics_variables]


def add_metrics(model: keras.Model, values: list[np.ndarray]) -> None:
    """Adds what an epoch had gathered before it was interrupted: sums, as metrics keep them."""
    variables = model.metrics_variables
    if len(variables) == len(values):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(_number(variable) + value)


def callback_states(callbacks: Sequence[keras.callbacks.Callback]) -> list[Config]:
    """Returns what callbacks remember, as plain data, in their order."""
    return [_remembered(one) for one in callbacks]


def _remembered(callback: keras.callbacks.Callback) -> Config:
    if hasattr(callback, "get_state"):
        found: Config = callback.get_state()
        return {"class": type(callback).__name__, "state": found}
    if isinstance(callback, keras.callbacks.History):
        return {"class": "History", "history": [callback.epoch, _plain(callback.history)]}
    named = {name: vars(callback)[name] for name in _REMEMBERED if name in vars(callback)}
    plain = {k: float(v) for k, v in named.items() if isinstance(v, int | float | np.number)}
    return {"class": type(callback).__name__, "named": plain}


def restore_callbacks(
    callbacks: Sequence[keras.callbacks.Callback],
    states: Sequence[Config],
    arrays: dict[str, np.ndarray],
) -> None:
    """Gives callbacks back what they remembered, the first of a class to the first of it."""
    waiting = list(enumerate(states))
    for callback in callbacks:
        fitting = (one for one in waiting if one[1]["class"] == type(callback).__name__)
        number, found = next(fitting, (-1, None))
        if found is None:
            continue
        waiting.remove((number, found))
        give_back(callback, number, arrays)
        if "state" in found:
            callback.set_state(found["state"])
        if "history" in found:
            callback.epoch, callback.history = found["history"]
        for name, value in found.get("named", {}).items():
            now = vars(callback).get(name)
            setattr(callback, name, int(value) if isinstance(now, int) else value)


def _number(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))
