"""tfmot's own schedule classes, usable with Keras 3, from settings and back."""

from __future__ import annotations

import math
import os
from numbers import Real
from typing import Any, Literal, Protocol

import keras
import numpy as np
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


_Base: Any = _tfmot.PruningSchedule


class Threshold(_Base):  # type: ignore[misc]
    """Weights whose magnitude lies below a value go, however many they are.

    Of `Block`, `Rows` and `Columns`, those go whose norm for each weight (the mean magnitude, or
    the root mean square for `norm="l2"`) lies below it. A weight never loses more than `at_most`:
    where more lies below, the smallest go.

    Args:
        threshold: float > 0. The value at the end.
        relative_to: `"mean"` or `"rms"`: the value is a factor of the weight's own mean magnitude
            or root mean square, zeros included, at the time. Defaults to `None`: it is a magnitude.
        at_most: float in `(0, 1)`. The largest share of a weight that may go. Defaults to `0.95`.
        begin_step: int >= 0. First step of `optimizer.iterations` that prunes. Defaults to `0`.
        end_step: int. The step that reaches the value; `-1` for a value that stays the same from
            `begin_step` on, for ever. Defaults to `-1`.
        initial: float >= 0. The value at `begin_step`, where there is an `end_step`. Defaults to
            `0.0`.
        power: float. Exponent of the polynomial between the two values. Defaults to `3.0`, as in
            `PolynomialDecay`.
        frequency: int >= 1. Steps from one change of the masks to the next. Defaults to `100`.

    Raises:
        ValueError: If a setting is out of range.

    Example:

    ```python
    threshold = Threshold(0.5, relative_to="rms", begin_step=2, end_step=6, frequency=2)
    model.fit(data, callbacks=[Pruning(threshold)])
    print(tfgptopt.pruning.report(model))
    ```

    Reference: Han et al., 2015, "Learning both Weights and Connections for Efficient Neural
    Networks" (https://arxiv.org/abs/1506.02626).
    """

    threshold: float
    relative_to: Literal["mean", "rms"] | None
    at_most: float
    begin_step: int
    end_step: int
    initial: float
    power: float
    frequency: int

    def __init__(
        self,
        threshold: float,
        relative_to: Literal["mean", "rms"] | None = None,
        at_most: float = 0.95,
        begin_step: int = 0,
        end_step: int = -1,
        initial: float = 0.0,
        power: float = 3.0,
        frequency: int = 100,
    ) -> None:
        for name, value, low in (("threshold", threshold, 1e-30), ("initial", initial, 0.0)):
            if not isinstance(value, Real) or not low <= value < math.inf:
                raise ValueError(f"`{name}` must be a positive number. Received: {value!r}")
        if relative_to not in (None, "mean", "rms"):
            raise ValueError(f"`relative_to` must be 'mean', 'rms' or None. Got: {relative_to!r}")
        if not isinstance(at_most, Real) or not 0.0 < at_most < 1.0:
            raise ValueError(f"`at_most` must be a share in (0, 1). Received: {at_most!r}")
        if begin_step < 0 or frequency < 1 or not (end_step == -1 or end_step > begin_step):
            raise ValueError(
                "`begin_step` must be >= 0, `frequency` >= 1, and `end_step` behind `begin_step`, "
                f"or -1. Received: {begin_step}, {frequency}, {end_step}"
            )
        self.threshold, self.relative_to, self.at_most = float(threshold), relative_to, at_most
        self.begin_step, self.end_step, self.initial = begin_step, end_step, float(initial)
        self.power, self.frequency = float(power), frequency

    def __call__(self, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        since = tf.cast(step, tf.int64) - self.begin_step
        fires = (since >= 0) & tf.equal(since % self.frequency, 0)
        if self.end_step < 0:
            return fires, tf.constant(self.threshold)
        length = self.end_step - self.begin_step
        fires = (fires & (since <= length)) | tf.equal(since, length)
        left = 1.0 - tf.clip_by_value(tf.cast(since, tf.float32) / length, 0.0, 1.0)
        return fires, self.threshold + (self.initial - self.threshold) * left**self.power

    def get_config(self) -> Config:
        """Returns the schedule as plain data."""
        return dict(vars(self))

    def of(self, weights: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        """Returns the magnitude below which weights go, for a value of the schedule."""
        if self.relative_to == "mean":
            return value * tf.reduce_mean(tf.abs(weights))
        if self.relative_to == "rms":
            return value * tf.sqrt(tf.reduce_mean(tf.square(weights)))
        return value


_CLASSES = {
    "polynomial_decay": PolynomialDecay,
    "constant_sparsity": ConstantSparsity,
    "threshold": Threshold,
}
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
        # These compute step by step whatever the shape: a call for all steps traces nothing.
        known = type(schedule) in _CLASSES.values()
        self._evaluate = schedule if known else tf.function(self._evaluate_each)
        self.at(0)

    def _evaluate_each(self, steps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def one(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            fires, sparsity = self.schedule(step)
            return tf.cast(fires, tf.bool), tf.cast(sparsity, tf.float32)

        return tf.map_fn(one, steps, fn_output_signature=(tf.bool, tf.float32))

    def at(self, step: int) -> tuple[bool, float]:
        """Returns `(fires, sparsity)` of one step."""
        start = step - step % _WINDOW
        if start not in self._windows:
            window = self._evaluate(tf.range(start, start + _WINDOW, dtype=tf.int64))
            fires, sparsities = (np.broadcast_to(found, (_WINDOW,)).tolist() for found in window)
            self._windows[start] = fires, sparsities
        fires, sparsities = self._windows[start]
        fires_at, sparsity_at = fires[step - start], sparsities[step - start]
        if isinstance(self.schedule, PolynomialDecay) and step == self.schedule.end_step:
            # tfmot misses its own final sparsity where `frequency` does not divide the duration.
            fires_at = True
        if math.isnan(sparsity_at):
            # tfmot divides by zero where a decay begins and ends at the same step.
            sparsity_at = float(getattr(self.schedule, "final_sparsity", math.nan))
        most = math.inf if isinstance(self.schedule, Threshold) else 1.0
        if fires_at and not 0.0 <= sparsity_at < most:
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
        if isinstance(self.schedule, Threshold) or final_sparsity(self.schedule) is not None:
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
