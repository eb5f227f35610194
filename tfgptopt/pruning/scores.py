"""How important the weights of a kernel are.

A score is a frozen setting; `meter` gives the object that measures with it on one model. Higher
means more important. Scores are matrices `(inputs, outputs)`, as patterns read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import keras
import tensorflow as tf

from tfgptopt.calibration.batches import Batches, batches_of
from tfgptopt.calibration.routing import warn_of_unread
from tfgptopt.calibration.statistics import SquaredSums, by_weight
from tfgptopt.calibration.watching import observe_all
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import stage


class Meter(Protocol):
    """Measures the scores of a model's targets."""

    def prepare(self) -> None:
        """Gathers, in Python, what the next scores need."""
        return

    def scores(self, index: int, weights: tf.Tensor) -> tf.Tensor:
        """Returns the scores of target `index`, whose weights are a matrix."""

    def variables(self, index: int) -> list[Any]:
        """Returns what a checkpoint has to hold for target `index`."""
        return []

    def follow(self, model: keras.Model) -> None:
        """Begins to measure, or goes on after the model was compiled anew."""
        return

    def close(self) -> None:
        """Stops measuring."""
        return


@runtime_checkable
class Score(Protocol):
    """A setting that says how important weights are.

    Attributes:
        name: Its name in recipes.
    """

    name: ClassVar[str]

    def check(self) -> None:
        """Raises if something is missing to measure with."""

    def meter(self, model: keras.Layer, chosen: list[Target]) -> Meter:
        """Returns what measures a model."""


@dataclass(frozen=True)
class Magnitude:
    """Absolute values: a small weight matters little. Needs no data and costs nothing.

    Reference: Han et al., 2015, "Learning both Weights and Connections for Efficient Neural
    Networks" (https://arxiv.org/abs/1506.02626).
    """

    name: ClassVar[str] = "magnitude"

    def check(self) -> None:
        """Raises if something is missing; nothing can be."""

    def meter(self, model: keras.Layer, chosen: list[Target]) -> Meter:
        """Returns what measures a model."""
        return _MagnitudeMeter()


class _MagnitudeMeter(Meter):
    def scores(self, index: int, weights: tf.Tensor) -> tf.Tensor:
        return tf.abs(weights)


@dataclass(frozen=True)
class Random:
    """Numbers that tell nothing of the weights: the baseline that a score has to beat.

    They are drawn once for each weight, so that what was pruned stays pruned while a schedule goes
    on, and a run that is resumed sees the same.

    Args:
        seed: int. Another seed, other weights. Defaults to `0`.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def check(self) -> None:
        """Raises if something is missing; nothing can be."""

    def meter(self, model: keras.Layer, chosen: list[Target]) -> Meter:
        """Returns what measures a model."""
        return _RandomMeter(self.seed)


class _RandomMeter(Meter):
    def __init__(self, seed: int) -> None:
        self._seed = seed

    def scores(self, index: int, weights: tf.Tensor) -> tf.Tensor:
        return draw(self._seed, index, tf.shape(weights), 0)


def draw(seed: int, index: int, shape: tf.Tensor, step: tf.Tensor | int) -> tf.Tensor:
    """Returns numbers in `[0, 1)` that are the same on every machine for the same four."""
    seeds = tf.stack([tf.constant(seed * 100_003 + index, tf.int64), tf.cast(step, tf.int64)])
    return tf.random.stateless_uniform(shape, seeds, alg="philox")


@dataclass(frozen=True)
class Wanda:
    """Absolute values times the norm of the inputs they meet: `|W| * ||X||`.

    The model reads the calibration data before each change of the masks. The paper lets the
    weights of one output compete: `Unstructured(scope="output")`.

    Args:
        data: Calibration data, a few hundred windows at most: a finite `tf.data.Dataset` or
            arrays, as `fit` takes them. It is not part of a recipe.

    Reference: Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language
    Models" (https://arxiv.org/abs/2306.11695).
    """

    data: Data = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "wanda"

    def check(self) -> None:
        """Raises if there is no calibration data."""
        if self.data is None:
            raise ValueError("Wanda needs calibration data: Wanda(dataset.take(16)).")

    def meter(self, model: keras.Layer, chosen: list[Target]) -> Meter:
        """Returns what measures a model."""
        return _WandaMeter(model, chosen, self.data)


class _WandaMeter(Meter):
    def __init__(self, model: keras.Layer, chosen: list[Target], data: Data) -> None:
        # Read once, so that a generator serves every firing, and tried now rather than then.
        self._model, self._targets, self._data = model, chosen, batches_of(data)
        observe_all(model, chosen, Batches(self._data[:1]), lambda target, rows: None)
        shapes = [(t.matrix_shape[0], len(t.parts)) for t in chosen]
        self._norms = [tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes]

    def prepare(self) -> None:
        squares = SquaredSums(self._targets)
        calls = len(self._data) * sum(len(target.parts) for target in self._targets)
        with stage("Reading the calibration data", calls) as shown:

            def observe(target: Target, rows: tf.Tensor) -> None:
                squares(target, rows)
                shown.advance()

            observe_all(self._model, self._targets, self._data, observe)
        for target, norm in zip(self._targets, self._norms, strict=True):
            norm.assign(squares.norms(target))
        unread = [part for target in self._targets for part in squares.unread(target)]
        warn_of_unread(unread, "pruned by magnitude", stacklevel=2)

    def scores(self, index: int, weights: tf.Tensor) -> tf.Tensor:
        return tf.abs(weights) * by_weight(self._norms[index], self._targets[index])


@dataclass(frozen=True)
class Movement:
    """How far training moved a weight away from zero: the sum of `-weight * gradient`.

    Good where a pretrained model is fine-tuned, whose magnitudes tell of the old task. It gathers
    in the compiled step, from the first step on; give the schedule some steps before it begins.
    It costs four bytes per weight. A pruned weight is zero and its score stands still.

    Reference: Sanh et al., 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning"
    (https://arxiv.org/abs/2005.07683).
    """

    name: ClassVar[str] = "movement"

    def check(self) -> None:
        """Raises if something is missing; what has no optimizer is found by `meter`."""

    def meter(self, model: keras.Layer, chosen: list[Target]) -> Meter:
        """Returns what measures a model."""
        return _MovementMeter(model, chosen)


class GradientMeter(Meter):
    """Gathers something of the gradients of weights, in the optimizer's compiled step.

    Args:
        model: A compiled model.
        chosen: Its weights.
        who: What needs the gradients, for messages.
    """

    def __init__(self, model: keras.Model, chosen: list[Target], who: str) -> None:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(f"{who} needs gradients: compile the model, and prune it in `fit`.")
        self._targets = chosen
        self._optimizer: Any = None
        self._closed = False
        self._sums = [
            keras.Variable(
                tf.zeros(t.variable.shape), trainable=False, name=f"{t.layer.name}_gathered"
            )
            for t in chosen
        ]

    def gather(self, optimizer: Any, total: Any, gradient: tf.Tensor, variable: Any) -> None:
        """Takes what it wants of a float32 gradient, before the weight is updated."""
        raise NotImplementedError

    def follow(self, model: keras.Model) -> None:
        # Inside mixed float16 training, the inner optimizer gets the true gradients.
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if optimizer is self._optimizer:
            return
        if self._optimizer is not None:
            self.close()
        self._closed = False
        self._optimizer, update = optimizer, optimizer.update_step
        key = optimizer._var_key
        sums = {key(t.variable): s for t, s in zip(self._targets, self._sums, strict=True)}

        def update_step(
            gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
        ) -> None:
            total = sums.get(key(variable))
            if total is not None and not self._closed:
                self.gather(optimizer, total, tf.cast(gradient, tf.float32), variable)
            update(gradient, variable, learning_rate)

        self._update_step = update_step
        object.__setattr__(optimizer, "update_step", update_step)

    def has_gathered(self) -> bool:
        """Returns whether there was a gradient yet."""
        return any(bool(keras.ops.any(total.value != 0)) for total in self._sums)

    def scores(self, index: int, weights: tf.Tensor) -> tf.Tensor:
        target = self._targets[index]
        return target.to_matrix(tf.convert_to_tensor(self._sums[index].value))

    def variables(self, index: int) -> list[Any]:
        return [self._sums[index]]

    def close(self) -> None:
        if self._optimizer is None:
            return
        self._closed = True
        if vars(self._optimizer).get("update_step") is self._update_step:
            object.__delattr__(self._optimizer, "update_step")


class _MovementMeter(GradientMeter):
    def __init__(self, model: keras.Model, chosen: list[Target]) -> None:
        super().__init__(model, chosen, "Movement")

    def gather(self, optimizer: Any, total: Any, gradient: tf.Tensor, variable: Any) -> None:
        optimizer.assign_sub(total, gradient * tf.cast(variable, tf.float32))

    def prepare(self) -> None:
        if not self.has_gathered():
            raise ValueError(
                "Movement has seen no gradient yet, so it cannot tell which weights to prune. Let "
                "the schedule begin later, or load the checkpoint after the training has begun "
                "(BackupAndRestore does)."
            )
