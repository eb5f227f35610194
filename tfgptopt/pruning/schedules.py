"""tfmot's own schedule classes, usable with Keras 3, from settings and back."""

from __future__ import annotations

import math
import os
from typing import Any, Protocol

import keras
import tensorflow as tf

from tfgptopt.model.types import Config


def _import_tfmot_schedules() -> Any:
    """Imports tfmot without the switch to tf_keras that its import leaves in the environment."""
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    try:
        from tensorflow_model_optimization.python.core.sparsity.keras import pruning_schedule
    finally:
        if before is None:
            os.environ.pop("TF_USE_LEGACY_KERAS", None)
        else:
            os.environ["TF_USE_LEGACY_KERAS"] = before
    return pruning_schedule


assert keras.__version__ >= "3"  # Keras must be imported before tfmot.
_tfmot = _import_tfmot_schedules()


class Schedule(Protocol):
    """A schedule as type checkers see it; it has to be a subclass of tfmot's `PruningSchedule`."""

    def __call__(self, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns whether to prune at a step, and the sparsity."""

    def get_config(self) -> Config:
        """Returns the schedule as plain data."""


PruningSchedule = _tfmot.PruningSchedule
PolynomialDecay = _tfmot.PolynomialDecay
ConstantSparsity = _tfmot.ConstantSparsity

_CLASSES = {"polynomial_decay": PolynomialDecay, "constant_sparsity": ConstantSparsity}
# Steps evaluated at once; a schedule costs about ten microseconds a step this way.
_WINDOW = 512
# Steps that are checked before training where its length is not known.
_AHEAD = 10_000


def serialize_schedule(schedule: Schedule) -> Config:
    """Returns a schedule as plain data: its name and its arguments.

    A subclass of a user is written under the name of its class, which can be read by people but
    not by `deserialize_schedule`.
    """
    config = schedule.get_config()
    # tfmot nests the arguments one level deeper than Keras does.
    arguments = config.get("config", config)
    names = {schedule_class: name for name, schedule_class in _CLASSES.items()}
    return {"name": names.get(type(schedule), type(schedule).__name__), **arguments}


def deserialize_schedule(config: Config) -> Schedule:
    """Returns the schedule that `serialize_schedule` wrote.

    Raises:
        ValueError: If the name or an argument is not known or out of range.
    """
    config = dict(config)
    name = config.pop("name", None)
    if name not in _CLASSES:
        raise ValueError(f"A schedule is named {' or '.join(_CLASSES)}. Received: {name!r}")
    try:
        return _CLASSES[name](**config)
    except TypeError as error:
        raise ValueError(f"Wrong settings for {name}: {sorted(config)} ({error})") from None


def last_step(schedule: Schedule) -> int | None:
    """Returns the last step of a schedule, or `None` if it has no end."""
    end = getattr(schedule, "end_step", None)
    return None if end is None or end < 0 else int(end)


def final_sparsity(schedule: Schedule) -> float | None:
    """Returns the sparsity that tfmot's schedules end with, `None` for a subclass of a user."""
    for name in ("final_sparsity", "target_sparsity"):
        if hasattr(schedule, name):
            return float(getattr(schedule, name))
    return None


class Timeline:
    """Answers when a schedule fires, and with what sparsity, without a call for every step.

    Args:
        schedule: A `PruningSchedule`: a callable from a step to `(should_prune, sparsity)`.

    Raises:
        ValueError: If `schedule` is no schedule, or gives sparsities outside `[0, 1)`.
    """

    def __init__(self, schedule: Schedule) -> None:
        if not isinstance(schedule, PruningSchedule):
            raise ValueError(
                "`schedule` must be a tfmot PruningSchedule such as "
                "PolynomialDecay(0.0, 0.5, begin_step, end_step). "
                f"Received: {schedule!r} (of type {type(schedule)})"
            )
        self.schedule = schedule
        self._windows: dict[int, tuple[list[bool], list[float]]] = {}
        step = tf.TensorSpec((), tf.int64)
        self._evaluate = tf.function(self._evaluate_window).get_concrete_function(step)
        self.at(0)

    def _evaluate_window(self, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def one(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            fires, sparsity = self.schedule(step)
            return tf.cast(fires, tf.bool), tf.cast(sparsity, tf.float32)

        steps = start + tf.range(_WINDOW, dtype=tf.int64)
        return tf.map_fn(one, steps, fn_output_signature=(tf.bool, tf.float32))

    def at(self, step: int) -> tuple[bool, float]:
        """Returns `(fires, sparsity)` of one step."""
        start = step - step % _WINDOW
        if start not in self._windows:
            window = self._evaluate(tf.constant(start, tf.int64))
            self._windows[start] = (window[0].numpy().tolist(), window[1].numpy().tolist())
        fires, sparsities = self._windows[start]
        fires_at, sparsity_at = fires[step - start], sparsities[step - start]
        if isinstance(self.schedule, PolynomialDecay) and step == self.schedule.end_step:
            # tfmot misses its own final sparsity where `frequency` does not divide the duration.
            fires_at = True
        if math.isnan(sparsity_at):
            # tfmot divides by zero where a decay begins and ends at the same step.
            sparsity_at = float(getattr(self.schedule, "final_sparsity", math.nan))
        if fires_at and not 0.0 <= sparsity_at < 1.0:
            raise ValueError(
                f"The schedule {type(self.schedule).__name__} gives sparsity {sparsity_at} at step "
                f"{step}. Expected a number in [0, 1)."
            )
        return fires_at, sparsity_at

    def check(self, first: int, last: int | None = None) -> None:
        """Raises if a schedule of a user gives a sparsity out of range later on.

        Args:
            first: int, the first step.
            last: int, the last step that training will reach. Defaults to `None`: the end of the
                schedule, or 10,000 steps if it has none.

        Raises:
            ValueError: If a sparsity is outside `[0, 1)`, with its step.
        """
        if final_sparsity(self.schedule) is not None:
            return  # tfmot has checked its own.
        end = last_step(self.schedule)
        if last is None:
            last = first + _AHEAD if end is None else end
        for step in range(first, last + 1 if end is None else min(last, end) + 1):
            self.at(step)

    def last_firing(self, first: int, last: int) -> float | None:
        """Returns the sparsity of the last step in `[first, last]` that fires, if any does."""
        end = last_step(self.schedule)
        last = last if end is None else min(last, end)
        for step in range(last, first - 1, -1):
            fires, sparsity = self.at(step)
            if fires:
                return sparsity
        return None
