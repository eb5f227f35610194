"""Applies a schedule to a model: used by the callback, by custom loops, and for one shot."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.model import masks
from tfgptopt.model.changing import changing, strategy_scope
from tfgptopt.model.targets import Target, select
from tfgptopt.pruning.checkpointing import mask_state, overlap
from tfgptopt.pruning.patterns import check_reaches
from tfgptopt.pruning.regrowth import moved, share_at
from tfgptopt.pruning.schedules import Threshold, Timeline
from tfgptopt.pruning.scores import Meter, Score
from tfgptopt.pruning.sparsegpt import SparseGPT
from tfgptopt.pruning.technique import Prune


def score_along_schedule(technique: Prune) -> Score:
    """Returns the score of a technique, which has to prune step by step.

    Raises:
        ValueError: If it prunes at once.
    """
    if isinstance(technique.score, SparseGPT):
        raise ValueError(
            "SparseGPT(data) prunes at once, with `tfgptopt.prune`; along a schedule use "
            "Magnitude(), Wanda(data), Movement() or Random()."
        )
    return technique.score


class Pruner:
    """Holds the masks of a model and moves them along a schedule.

    The callback `Pruning` uses it. In a loop of your own, call `step()` before each batch:

    ```python
    pruner = Pruner(model, Prune(PolynomialDecay(0.0, 0.5, 100, 900)))
    for batch in data:
        pruner.step()
        model.train_on_batch(*batch)
    tfgptopt.finalize(model)
    ```

    Args:
        model: A built Keras 3 model. It is dressed in place at the first step.
        technique: `Prune(...)`, its schedule in steps of `optimizer.iterations`.

    Raises:
        ValueError: If the technique does not fit the model.
    """

    def __init__(self, model: keras.Layer, technique: Prune) -> None:
        score = score_along_schedule(technique)
        self.timeline = Timeline(technique.schedule)
        self.model = model
        self.technique = technique
        self.targets = technique.check(model)
        self._index = {id(target.variable): i for i, target in enumerate(self.targets)}
        self.seen = self._scanned = -1  # Steps up to which the masks are as they should be.
        self._next: int | None = None  # The first firing that was not seen yet.
        self._floor = self._sparsity = 0.0
        self._attached: list[Target] | None = None
        with strategy_scope(model):
            self.meter = score.meter(model, self.targets)
            regrow = technique.regrow
            self._growing = None if regrow is None else regrow.meter(model, self.targets)
        self._finite = tf.function(self._all_finite, autograph=False)
        self._update = tf.function(self._update_all, autograph=False)
        self._update_below = tf.function(self._update_all_below, autograph=False)
        self._move = tf.function(self._move_all, autograph=False)
        mask_state(model)  # A checkpoint may be loaded before the first step.

    def attach(self) -> None:
        """Dresses the model, once. It is the first time that the model is changed."""
        if self._attached is not None:
            return
        for target in self.targets:
            if masks.masked(target.variable) and target.variable.constraint.owner is not None:
                target.variable.constraint.owner.close()
        self._attached = [t for t in self.targets if not masks.masked(t.variable)]
        before = _update_step_of(self.model)
        self._follow()
        same = not self._attached and _update_step_of(self.model) is before
        # Masks that are there change nothing in the step that was traced with them.
        with strategy_scope(self.model) if same else changing(self.model):
            masks.attach(self.model, self._attached, self.technique)
            for target in self.targets:
                target.variable.constraint.owner = self
                target.variable.constraint.technique = self.technique
                target.variable.constraint.belongs_to(self.model)
            # Masks that an earlier pruning left are never opened by a schedule that starts low.
            self._floor = self._sparsity = self._masked_share()
            mask_state(self.model).restore()  # What a checkpoint brought before.

    @property
    def _meters(self) -> list[Meter]:
        return [self.meter] if self._growing is None else [self.meter, self._growing]

    def _follow(self) -> None:
        for meter in self._meters:
            meter.follow(self.model)

    def gathered(self, index: int) -> list[Any]:
        """Returns what a checkpoint has to hold for target `index`, besides its mask."""
        return [variable for meter in self._meters for variable in meter.variables(index)]

    def _scores(self) -> list[tf.Tensor]:
        return [self.meter.scores(i, _matrix(target)) for i, target in enumerate(self.targets)]

    def _all_finite(self) -> tf.Tensor:
        # A sum is not finite where one of its terms is not, and takes no memory.
        return tf.stack([tf.math.is_finite(tf.reduce_sum(scores)) for scores in self._scores()])

    def _update_all(self, sparsity: tf.Tensor) -> None:
        self._assign(self.technique.pattern.masks(self._scores(), tf.unstack(sparsity)))

    def _assign(self, found: list[tf.Tensor]) -> None:
        for target, matrix in zip(self.targets, found, strict=True):
            target.variable.constraint.mask.assign(target.from_matrix(matrix))
        masks.apply(self.targets)

    def _update_all_below(self, threshold: tf.Tensor) -> None:
        """Drops what lies below a threshold, and not more than it may."""
        pattern: Any = self.technique.pattern
        schedule: Any = self.technique.schedule
        found = []
        for target, scores in zip(self.targets, self._scores(), strict=True):
            units = pattern.units(scores)
            kept = pattern.mask_of(units >= schedule.of(_matrix(target), threshold), scores)
            share = 1.0 - tf.reduce_mean(tf.cast(kept, tf.float32))
            bounded = tf.constant(schedule.at_most, tf.float32)
            found.append(
                tf.cond(
                    share > bounded,
                    lambda scores=scores, bounded=bounded: pattern.masks([scores], [bounded])[0],
                    lambda kept=kept: kept,
                )
            )
        self._assign(found)

    def _move_all(self, sparsity: tf.Tensor, share: tf.Tensor, step: tf.Tensor) -> None:
        """Lets the smallest connections go and others grow."""
        regrow, growing = self.technique.regrow, self._growing
        assert regrow is not None and growing is not None
        found = []
        for i, (target, at) in enumerate(zip(self.targets, tf.unstack(sparsity), strict=True)):
            weights = _matrix(target)
            growth = regrow.growth(growing.scores(i, weights), i, weights, step)
            mask = target.to_matrix(tf.convert_to_tensor(target.variable.constraint.mask.value))
            found.append(moved(tf.abs(weights), mask, growth, at, share))
        self._assign(found)

    def _prune_to(self, sparsity: float, step: int) -> None:
        """Computes new masks, and zeroes what they drop."""
        shares = [sparsity] * len(self.targets)
        if self.technique.allocation is not None:
            shares = self.technique.allocation.at(sparsity, self.targets)
        pattern = self.technique.pattern
        if pattern.sparsity is not None and sparsity > pattern.sparsity:
            check_reaches(pattern, sparsity)
        with strategy_scope(self.model):
            self.meter.prepare()
            finite = self._finite().numpy()
            if not finite.all():
                paths = [t.path for t, ok in zip(self.targets, finite, strict=True) if not ok]
                raise ValueError(
                    f"{paths[0]} has weights or gradients that are NaN, infinite or near the "
                    f"largest float ({len(paths)} weights have): the training diverged. Nothing "
                    "was pruned."
                )
            if isinstance(self.technique.schedule, Threshold):
                self._update_below(tf.constant(sparsity, tf.float32))
            elif self._growing is not None and self._masked_share():
                self._grow(tf.constant(shares, tf.float32), step)
            else:
                self._update(tf.constant(shares, tf.float32))
        self._sparsity = self._masked_share()

    def _grow(self, shares: tf.Tensor, step: int) -> None:
        assert self._growing is not None and self.technique.regrow is not None
        self._growing.prepare()
        share = share_at(self.technique.regrow, self.technique.schedule, step)
        self._move(shares, tf.constant(share, tf.float32), tf.constant(step, tf.int64))

    def _masked_share(self) -> float:
        zeros = sum(masks.masked_share(target) * target.size for target in self.targets)
        return zeros / sum(target.size for target in self.targets)

    def due(self, step: int) -> bool:
        """Returns whether the schedule fires between the last step seen and `step`."""
        while self._next is None and self._scanned < step:
            self._scanned += 1
            if self.timeline.at(self._scanned)[0]:
                self._next = self._scanned
        return self._next is not None and self._next <= step

    def advance(self, step: int) -> None:
        """Moves to a step, with new masks if the schedule fires on the way.

        The first call catches up with what happened before: a model that was pruned by the
        schedule so far holds its masks as zeros.
        """
        self.attach()
        first = self.seen < 0 < step
        if first:
            self._catch_up(step - 1)
        sparsity = self.timeline.last_firing(self.seen + 1, step)
        by_threshold = isinstance(self.technique.schedule, Threshold)
        if sparsity and (by_threshold or sparsity > self._floor - 1e-3):
            self._prune_to(sparsity, step)
        self.moved_to(step)

    def moved_to(self, step: int) -> None:
        """Notes that the masks are as they should be at a step."""
        self.seen = max(self.seen, step)
        if self._next is not None and self._next <= step:
            self._next, self._scanned = None, step

    def _catch_up(self, step: int) -> None:
        """Makes the masks of an earlier step from the zeros that the weights have, if they do."""
        expected = self.timeline.last_firing(0, step)
        if expected and self._holds_zeros(expected):
            with strategy_scope(self.model):
                masks.read_from_zeros(self.targets)
            self._sparsity = self._masked_share()
            self.moved_to(step)
            self._warn_of_lost_scores(step)

    def _warn_of_lost_scores(self, step: int) -> None:
        gathered = [v for i in range(len(self.targets)) for v in self.gathered(i)]
        if gathered and not any(bool(keras.ops.any(v.value != 0)) for v in gathered):
            warnings.warn(
                f"The model was pruned up to step {step}, but {self.technique.score} has none of "
                "the scores that were gathered: its checkpoint was loaded before the pruning was "
                "there. They are gathered anew from here on. To resume exactly, use "
                "BackupAndRestore, or call `pruning.set_model(model)` before `load_weights`.",
                stacklevel=2,
            )

    def _holds_zeros(self, sparsity: float) -> bool:
        if isinstance(self.technique.schedule, Threshold):
            sparsity = 1e-6  # Nobody knows how many lay below: any.
        total = sum(target.size for target in self.targets)
        zeros = sum(zero_share(target) * target.size for target in self.targets)
        return zeros >= sparsity * total * 0.99

    def step(self) -> None:
        """Moves to the optimizer's step. Call it before each batch of a loop of your own.

        Raises:
            ValueError: If the model is not compiled, so that nothing counts its steps.
        """
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                "The model is not compiled, so nothing counts its steps. Compile it, or call "
                "`advance(step)` with your own count."
            )
        now = int(keras.ops.convert_to_numpy(optimizer.iterations))
        if self._attached is None:
            self.timeline.check(now)
            self.attach()
        if self.due(now):
            self.advance(now)

    def can_continue(self, model: keras.Layer, step: int) -> bool:
        """Returns whether another `fit` goes on where this pruner stands."""
        owned = all(self._owns(target) for target in self.targets)
        if self.model is not model or not owned or step < self.seen:
            return False
        self._follow()
        return True

    def check_model(self) -> None:
        """Raises if the model's weights are others than those that were dressed.

        Raises:
            ValueError: If weights were added or replaced since.
        """
        known = {id(target.variable) for target in self.targets}
        now = {id(target.variable): target for target in select(self.model, self.technique.targets)}
        for key, target in now.items():
            if key not in known:
                raise ValueError(
                    f"{target.path} was added to the model after pruning began. Call "
                    "`tfgptopt.finalize(model)`, and give a new `Pruning` to `fit`."
                )
        for target in self.targets:
            if target.layer.trainable and id(target.variable) not in now:
                raise ValueError(
                    f"{target.path} is being pruned, but cannot be found in the model any more. "
                    "Call `tfgptopt.finalize(model)`, and give a new `Pruning` to `fit`."
                )

    def _owns(self, target: Target) -> bool:
        return getattr(target.variable.constraint, "owner", None) is self

    def targets_index(self, target: Target) -> int:
        """Returns the place of a weight among the targets."""
        return self._index[id(target.variable)]

    def resume(self, seen: int) -> None:
        """Goes on behind a step whose masks a checkpoint has brought."""
        self.seen = self._scanned = seen
        self._next = None
        self._sparsity = self._masked_share()

    def check_ownership(self) -> None:
        """Raises if another pruner took over the weights, and takes its own masks off them.

        Raises:
            ValueError: If two pruners act on one weight.
        """
        for target in self.targets:
            if not self._owns(target):
                masks.remove(self._attached or [])
                self.close()
                raise ValueError(overlap(target))

    def check_not_taken(self) -> None:
        """Raises if another pruner holds a weight of this one.

        Raises:
            ValueError: If two pruners act on one weight.
        """
        if any(masks.masked(t.variable) and not self._owns(t) for t in self.targets):
            self.check_ownership()

    def close(self) -> None:
        """Stops measuring; the masks stay."""
        for meter in reversed(self._meters):
            meter.close()

    @property
    def sparsity(self) -> float:
        """Share of pruned weights over all targets, in `[0, 1)`."""
        return self._sparsity


def _update_step_of(model: keras.Layer) -> Any:
    """Returns what stands in for the optimizer's own step, if something does."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return vars(optimizer).get("update_step") if optimizer is not None else None


def _matrix(target: Target) -> tf.Tensor:
    """Returns a weight as a float32 matrix `(inputs, outputs)`."""
    return target.to_matrix(tf.cast(tf.convert_to_tensor(target.variable.value), tf.float32))


def zero_share(target: Target) -> float:
    """Returns the share of exact zeros in a weight."""
    zeros = tf.math.count_nonzero(tf.convert_to_tensor(target.variable.value), dtype=tf.int64)
    return 1.0 - float(zeros) / target.size
