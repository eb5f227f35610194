"""Finds a learning rate, by a test over a range of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.file.replacing import replacing
from tfgptopt.training.replicas import PREPARED, prepare

# The test ends where the smoothed loss is this many times the lowest.
_DIVERGED = 1.5
# The suggestion is the rate of the lowest loss, divided by this.
_SAFETY = 10.0
_SMOOTHING = 0.9


@dataclass(frozen=True)
class LearningRates:
    """What a range test saw.

    Attributes:
        rates: Learning rates, rising.
        losses: Loss of the batch at each of them.
        smoothed: The same, averaged over the steps before.
        suggestion: A tenth of the rate at which the smoothed loss was lowest.
        rose: Whether the loss rose again before the range ended, so that the range was wide enough.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    rose: bool

    def plot(self, path: str | Path) -> None:
        """Draws losses over rates, with the suggestion.

        Args:
            path: The image to write; its suffix is the format, such as `.png` or `.svg`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="lightgray", label="loss of a batch")
        axes.plot(self.rates, self.smoothed, label="smoothed")
        axes.axvline(self.suggestion, linestyle="--", label=f"suggestion {self.suggestion:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")

    def describe(self) -> str:
        """Returns a line that says what to take."""
        line = f"Learning rate {self.suggestion:.1e}: a tenth of where the loss was lowest"
        if not self.rose:
            line += f"; it still fell at {self.rates[-1]:.1e}, so try higher ones too"
        return line


class _Recorder(keras.callbacks.Callback):
    """Keeps the loss of each batch, and ends the test when it diverges."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.diverged = False

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        # Keras gives the mean since the epoch began.
        mean = float(logs["loss"])
        self.losses.append(mean * (batch + 1) - sum(self.losses))
        if not math.isfinite(self.losses[-1]):
            self.diverged = self.model.stop_training = True
            return
        self.smoothed.append(_smooth(self.losses)[-1])
        if self.smoothed[-1] > _DIVERGED * min(self.smoothed):
            self.diverged = self.model.stop_training = True


def _smooth(losses: list[float]) -> list[float]:
    """Returns averages of the losses so far, the last ones weighing most."""
    average, smoothed = 0.0, []
    for i, loss in enumerate(losses):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING ** (i + 1)))
    return smoothed


def find_learning_rate(
    model: keras.Model,
    data: tf.data.Dataset,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> LearningRates:
    """Trains for some steps while the learning rate grows, and puts everything back as it was.

    Args:
        model: A compiled model, pruned or quantize-aware or not, or a `Distiller`. It is as before
            afterwards: weights, optimizer, random state.
        data: Batches as `fit` takes them, repeated as often as it takes.
        lowest: float. The first learning rate. Defaults to `1e-6`.
        highest: float. The last one, reached unless the loss diverges before. Defaults to `1.0`.
        steps: int of 20 or more. Updates of the optimizer. Defaults to `100`.

    Returns:
        `LearningRates`, with a suggestion for the peak of a schedule.

    Raises:
        ValueError: If the model is not compiled, a number is out of range, or the loss is not
            finite at the lowest rates.

    Example:

    ```python
    from tfgptopt.training import find_learning_rate

    found = find_learning_rate(model, data, steps=20)
    print(found.describe())
    found.plot("rates.png")
    ```

    Reference: Smith, 2017, "Cyclical Learning Rates for Training Neural Networks"
    (https://arxiv.org/abs/1506.01186).
    """
    if getattr(model, "optimizer", None) is None:
        raise ValueError("The model is not compiled: call `model.compile(...)` first.")
    if not 0.0 < lowest < highest or not isinstance(steps, int) or steps < 20:
        raise ValueError(
            "`lowest` must be above 0 and below `highest`, and `steps` at least 20. Received: "
            f"lowest={lowest!r}, highest={highest!r}, steps={steps!r}"
        )
    recorder = _Recorder()
    growth = highest / lowest
    rate = keras.optimizers.schedules.ExponentialDecay(lowest, steps - 1, growth)
    with _trial(model, rate):
        model.fit(
            data.repeat(), steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[recorder]
        )
    per_log = int(model.steps_per_execution)
    rates = [lowest * growth ** (per_log * i / (steps - 1)) for i in range(len(recorder.losses))]
    kept = [i for i, loss in enumerate(recorder.losses) if math.isfinite(loss)]
    if len(kept) < 3:
        raise ValueError(
            f"The loss is not finite at a learning rate of {lowest:.1e} already. Look at the data "
            "and the weights, or begin lower."
        )
    smoothed = _smooth([recorder.losses[i] for i in kept])
    best = rates[kept[int(np.argmin(smoothed))]]
    return LearningRates(
        tuple(rates[i] for i in kept),
        tuple(recorder.losses[i] for i in kept),
        tuple(smoothed),
        max(lowest, best / _SAFETY),
        recorder.diverged or best < rates[kept[-1]],
    )


@contextmanager
def _trial(model: Any, rate: Any) -> Iterator[None]:
    """Gives a model an optimizer with another rate, and then puts everything back."""
    own = model.optimizer
    inner = getattr(own, "inner_optimizer", own)
    config = {**inner.get_config(), "learning_rate": rate}
    with model.distribute_strategy.scope():
        trial = type(inner).from_config(config)
        if inner is not own:
            trial = keras.optimizers.LossScaleOptimizer(trial)
    kept = [(variable, keras.ops.convert_to_numpy(variable)) for variable in model.variables]
    traced = model.train_function
    # Keras' own way to run on replicas needs the same optimizer throughout.
    if model.distribute_strategy.num_replicas_in_sync > 1 and not getattr(model, PREPARED, False):
        prepare(model)
    try:
        model.optimizer = trial
        model.make_train_function(force=True)
        yield
    finally:
        model.optimizer = own
        for variable, value in kept:
            variable.assign(value)
        model.stop_training = False
        model.train_function = None
        if traced is not None:
            model.make_train_function(force=True)
