"""Pruning during `fit`."""

from __future__ import annotations

import warnings
from typing import Any, cast

import keras

from tfgptopt.model.changing import build_optimizer
from tfgptopt.model.targets import Selector
from tfgptopt.model.types import Data
from tfgptopt.pruning.checkpointing import mask_state
from tfgptopt.pruning.patterns import Pattern, Unstructured
from tfgptopt.pruning.pruner import Pruner, score_along_schedule
from tfgptopt.pruning.regrowth import Regrowth
from tfgptopt.pruning.schedules import Schedule, last_step
from tfgptopt.pruning.scores import Magnitude, Score, Wanda
from tfgptopt.pruning.sparsity_allocation import Allocation
from tfgptopt.pruning.technique import Prune
from tfgptopt.training.replicas import prepare_replicas


def last_mask_step(model: keras.Model, first: int, params: dict[str, Any]) -> int | None:
    """Returns the last value of `optimizer.iterations` at which a `fit` begins an execution."""
    epochs, steps = params.get("epochs"), params.get("steps")
    if not epochs or not steps:
        return None
    total = epochs * steps // (model.optimizer.gradient_accumulation_steps or 1)
    execution = model.steps_per_execution
    return int(first + (total - 1) // execution * execution)


class Pruning(keras.callbacks.Callback):
    """Prunes a model while `fit` trains it.

    At the steps at which the schedule fires, the weights with the lowest scores go. Between them
    the compiled train step holds the zeros by itself, after every batch. Zeros stay held after
    `fit`, until `tfgptopt.finalize(model)`.

    Steps count as `optimizer.iterations` does, so a second `fit`, or one that resumes from a
    checkpoint, continues where the first ended. `BackupAndRestore`, `ModelCheckpoint` and
    `save_weights` write masks and scores beside the weights; a plain model that loads such a
    checkpoint ignores them.

    Several `Pruning` with `targets` that do not overlap prune groups of weights in different ways.

    Args:
        schedule: A tfmot schedule: `PolynomialDecay`, `ConstantSparsity`, or your own subclass of
            `PruningSchedule`. Sparsities are shares in `[0, 1)`. Or a `Threshold`: what lies below
            a magnitude goes, whatever share that is.
        pattern: Which weights go together: `Unstructured()`, `NM(2, 4)`, `Block(4, 1)`, `Rows()`
            or `Columns()`. Defaults to `Unstructured()`.
        score: How important a weight is: `Magnitude()`, `Wanda(data)`, `Movement()`, or the
            baseline `Random()`. Defaults to `Magnitude()`.
        targets: Which weights to prune: a regular expression on their paths, a layer class, or a
            callable. Defaults to `None`: kernels of Dense and EinsumDense, wherever they are,
            but the head.
        allocation: How the sparsity is spread over weights, from `tfgptopt.pruning.owl` or
            `sensitivity(...).allocate(...)`. Defaults to `None`: evenly.
        regrow: `RigL()` or `SET()`: at each step of the schedule behind the first, the smallest
            connections go and as many others grow. Defaults to `None`: what is pruned stays so.

    Raises:
        ValueError: If the schedule is none or out of range; in `fit`, before the first step, if
            the model has no weights to prune, a weight cannot have the pattern or is not finite,
            or another `Pruning` acts on the same ones; at a step of the schedule, if weights or
            gradients are not finite.

    Example:

    ```python
    from tfgptopt.callbacks import Pruning
    from tfgptopt.pruning import PolynomialDecay

    schedule = PolynomialDecay(0.0, 0.5, begin_step=100, end_step=900, frequency=50)
    model.fit(data, callbacks=[Pruning(schedule)])
    ```

    Reference: Zhu and Gupta, 2017, "To prune, or not to prune: exploring the efficacy of pruning
    for model compression" (https://arxiv.org/abs/1710.01878).
    """

    def __init__(
        self,
        schedule: Schedule,
        pattern: Pattern = Unstructured(),
        score: Score = Magnitude(),
        targets: Selector | None = None,
        allocation: Allocation | None = None,
        regrow: Regrowth | None = None,
    ) -> None:
        super().__init__()
        self.technique = Prune(schedule, pattern, score, targets, allocation, regrow)
        self._pruner: Pruner | None = None
        self._epoch_start = 0

    @classmethod
    def of(cls, technique: Prune, calibration: Data = None) -> Pruning:
        """Returns the callback that carries out a technique.

        Args:
            technique: The technique.
            calibration: Data for a score that needs some and has none. Defaults to `None`.
        """
        score = cast(Score, technique.score)  # SparseGPT is refused where steps are made.
        if isinstance(score, Wanda) and score.data is None:
            score = Wanda(calibration)
        return cls(
            technique.schedule,
            technique.pattern,
            score,
            technique.targets,
            technique.allocation,
            technique.regrow,
        )

    @property
    def sparsity(self) -> float:
        """Share of pruned weights over all targets, in `[0, 1)`; 0 before training."""
        return self._pruner.sparsity if self._pruner else 0.0

    def _iterations(self) -> int:
        optimizer = getattr(self.model, "optimizer", None)
        return 0 if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))

    def set_model(self, model: keras.Model) -> None:
        # Keras does this for all callbacks of a `fit` before any may change the model.
        super().set_model(model)
        prepare_replicas(model)
        self._check(model)
        # Another callback may load a checkpoint, whose masks are kept there.
        mask_state(model).new_claims()

    def _check(self, model: keras.Model) -> None:
        if self._pruner is not None and self._pruner.can_continue(model, self._pruner.seen):
            self._pruner.check_model()
        else:
            score_along_schedule(self.technique)
            self.technique.check(model)

    def _ready(self) -> Pruner:
        """Returns the pruner of the model, made anew if the old one cannot go on."""
        if self._pruner is None or not self._pruner.can_continue(self.model, self._iterations()):
            self._pruner = Pruner(self.model, self.technique)
        return self._pruner

    def step(self) -> None:
        """Prunes if it is time to: for loops of your own, before each batch.

        ```python
        pruning = Pruning(PolynomialDecay(0.0, 0.5, begin_step=0, end_step=100))
        pruning.set_model(model)
        for batch in data:
            pruning.step()
            model.train_on_batch(*batch)
        ```

        Raises:
            ValueError: If there is no model: call `set_model` first.
        """
        if self.model is None:
            raise ValueError("There is no model yet: call `pruning.set_model(model)` first.")
        pruner = self._pruner
        if pruner is not None and pruner.model is self.model:
            pruner.check_not_taken()
        self._ready().step()

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        # The model is changed when the first epoch begins: another callback may still fail here.
        pruner = self._ready()
        mask_state(self.model).claim(pruner.targets, self)
        first = self._iterations()
        last = last_mask_step(self.model, first, self.params)
        pruner.timeline.check(first, last)
        self._warn_if_cut_off(first, last)

    def _warn_if_cut_off(self, first: int, last: int | None) -> None:
        end = last_step(self.technique.schedule)
        begin = getattr(self.technique.schedule, "begin_step", 0)
        if last is not None and last < (begin if end is None else end):
            what = f"begins at step {begin}" if last < begin else f"ends at step {end}"
            warnings.warn(
                f"The pruning schedule {what}, but the last step of this training that can prune "
                f"is {last} (it runs from step {first}): the final sparsity will not be reached.",
                stacklevel=2,
            )
        if end is not None and first > end:
            warnings.warn(
                f"The pruning schedule ended at step {end}, before this training begins at step "
                f"{first}: the final sparsity is applied at once.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert self._pruner is not None
        self._pruner.attach()
        build_optimizer(self.model)
        self._epoch_start = self._iterations()

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        assert self._pruner is not None
        # Batches run ahead of the optimizer, never behind it: without a firing up to here there
        # is no need to wait for the device to read its step.
        if self._pruner.due(self._epoch_start + batch):
            self._pruner.advance(self._iterations())

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if logs is not None:
            logs["sparsity"] = self.sparsity

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        # A run that is resumed behind its last epoch began none.
        if self._pruner is not None:
            self._pruner.attach()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if logs is not None:
            logs["sparsity"] = self.sparsity
