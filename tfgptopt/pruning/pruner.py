"""Applies a schedule to a model: used by the callback, by custom loops, and for one shot."""

from __future__ import annotations

import keras

from tfgptopt.pruning import masks
from tfgptopt.pruning.patterns import Unstructured
from tfgptopt.pruning.schedules import ConstantSparsity, PruningSchedule, Timeline
from tfgptopt.retracing import retrace, strategy_scope
from tfgptopt.targets import Selector, Target, select


class Pruner:
    """Holds the masks of a model and moves them along a schedule.

    Args:
        model: A built Keras 3 model.
        schedule: A `PruningSchedule`, in steps of `optimizer.iterations`.
        pattern: Which weights go together. Defaults to `Unstructured()`.
        targets: Selector of the weights to prune. Defaults to `None`: kernels of Dense and
            EinsumDense, wherever they are nested.

    Raises:
        ValueError: If the schedule is none, the model is not built, or nothing matches.
    """

    def __init__(
        self,
        model: keras.Layer,
        schedule: PruningSchedule,
        pattern: Unstructured | None = None,
        targets: Selector | None = None,
    ) -> None:
        self.timeline = Timeline(schedule)
        self.model = model
        self.targets = select(model, targets)
        self._seen = self._scanned = -1
        self._next: int | None = None  # The first firing that was not seen yet.
        self._attached = [t for t in self.targets if not masks.masked(t.variable)]
        with strategy_scope(model):
            masks.attach(self._attached, schedule)
        self._updater = masks.MaskUpdater(self.targets, pattern or Unstructured())
        for target in self.targets:
            target.variable.constraint.owner = self
            target.variable.constraint.schedule = schedule
        self._sparsity = self._updater.sparsity()
        retrace(model)

    def due(self, step: int) -> bool:
        """Returns whether the schedule fires between the last step seen and `step`."""
        while self._next is None and self._scanned < step:
            self._scanned += 1
            if self.timeline.at(self._scanned)[0]:
                self._next = self._scanned
        return self._next is not None and self._next <= step

    def advance(self, step: int) -> None:
        """Moves to a step, with a new mask if the schedule fires on the way.

        The first call catches up with what happened before: at a step in the middle of the
        schedule it computes the mask of the last firing, which a resumed model holds as zeros.
        """
        sparsity = self.timeline.last_firing(self._seen + 1, step)
        self._seen = max(self._seen, step)
        if self._next is not None and self._next <= step:
            self._next, self._scanned = None, step
        if sparsity:
            with strategy_scope(self.model):
                self._updater.update(sparsity)
            self._sparsity = self._updater.sparsity()

    def can_continue(self, model: keras.Layer, step: int) -> bool:
        """Returns whether another `fit` goes on where this pruner stands."""
        owned = all(self._owns(target) for target in self.targets)
        return self.model is model and owned and step >= self._seen

    def _owns(self, target: Target) -> bool:
        return getattr(target.variable.constraint, "owner", None) is self

    def hold(self) -> None:
        """Zeroes what the masks drop, where something else has written to the weights."""
        with strategy_scope(self.model):
            masks.apply([target for target in self.targets if self._owns(target)])

    def check_ownership(self) -> None:
        """Raises if another pruner took over the weights, and takes its own masks off them.

        Raises:
            ValueError: If two pruners act on one weight.
        """
        for target in self.targets:
            if not self._owns(target):
                masks.remove(self._attached)
                raise ValueError(
                    f"Two prunings act on {target.path}. Give each its own `targets`, or use one."
                )

    @property
    def sparsity(self) -> float:
        """Share of pruned weights over all targets, in `[0, 1)`."""
        return self._sparsity


def zero_share(target: Target) -> float:
    """Returns the share of exact zeros in a weight."""
    zeros = keras.ops.equal(target.variable.value, 0)
    return float(keras.ops.mean(keras.ops.cast(zeros, "float32")))


def prune(
    model: keras.Layer,
    sparsity: float,
    pattern: Unstructured | None = None,
    targets: Selector | None = None,
) -> keras.Layer:
    """Prunes a model at once, by magnitude, and holds the zeros in later training.

    Args:
        model: A built Keras 3 model. It is changed in place.
        sparsity: float in `[0, 1)`, the share of weights to drop from each tensor.
        pattern: Which weights go together. Defaults to `Unstructured()`.
        targets: Selector of the weights. Defaults to `None`: all kernels.

    Returns:
        The same model.

    Raises:
        ValueError: If `sparsity` is out of range, the model is not built, or nothing matches.

    Example:

    ```python
    tfgptopt.prune(model, 0.5)
    model.fit(data)             # recovers quality; pruned weights stay zero
    tfgptopt.finalize(model)
    ```
    """
    if not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"`sparsity` must be a number in [0, 1). Received: {sparsity!r}")
    for target in select(model, targets):
        if masks.masked(target.variable):
            raise ValueError(
                f"{target.path} is pruned already. Call `tfgptopt.finalize(model)` first to prune "
                "it again."
            )
    Pruner(model, ConstantSparsity(sparsity, 0, frequency=1), pattern, targets).advance(0)
    return model
