"""Masks that move while training: connections go, and as many others grow.

The schedule of the pruning says when, and how many stay. Where a weight has no mask yet, the score
makes the first one; from then on the smallest magnitudes go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import keras
import tensorflow as tf

from tfgptopt.model.targets import Target
from tfgptopt.model.types import Config
from tfgptopt.pruning.keeping import count_kept, keep_largest
from tfgptopt.pruning.schedules import Schedule, last_step
from tfgptopt.pruning.scores import GradientMeter, Meter, draw


@runtime_checkable
class Regrowth(Protocol):
    """A setting that says which connections grow.

    Attributes:
        name: Its name in recipes.
        share: Share of the connections that moves at the beginning.
    """

    name: ClassVar[str]

    @property
    def share(self) -> float:
        """Share of the connections that moves at the beginning."""

    def meter(self, model: keras.Layer, chosen: list[Target]) -> Meter:
        """Returns what measures which connections would grow."""

    def growth(self, gathered: tf.Tensor | None, index: int, like: tf.Tensor, step: Any) -> Any:
        """Returns how much each connection of a matrix deserves to grow."""


def _check_share(share: Any) -> None:
    if not isinstance(share, int | float) or not 0.0 < share < 1.0:
        raise ValueError(f"`share` must be a number in (0, 1). Received: {share!r}")


@dataclass(frozen=True)
class RigL:
    """Grows the connections whose gradients are largest, of the step before.

    It costs four bytes a weight. A connection that grows begins at zero; the optimizer's averages
    of it go on, which saw its gradients all along.

    Args:
        share: float in `(0, 1)`. Share of the connections that moves at first; it falls to zero
            along a half cosine until the schedule ends, or stays where it has no end. Defaults to
            `0.3`.

    Raises:
        ValueError: If `share` is out of range.

    Example:

    ```python
    from tfgptopt.pruning import ConstantSparsity, Random

    schedule = ConstantSparsity(0.9, begin_step=0, end_step=300, frequency=50)
    model.fit(data, callbacks=[Pruning(schedule, score=Random(), regrow=RigL())])
    ```

    Reference: Evci et al., 2020, "Rigging the Lottery: Making All Tickets Winners"
    (https://arxiv.org/abs/1911.11134).
    """

    share: float = 0.3

    name: ClassVar[str] = "rigl"

    def __post_init__(self) -> None:
        _check_share(self.share)

    def meter(self, model: keras.Model, chosen: list[Target]) -> Meter:
        """Returns what measures which connections would grow."""
        return _LastGradients(model, chosen, "RigL")

    def growth(self, gathered: tf.Tensor | None, index: int, like: tf.Tensor, step: Any) -> Any:
        """Returns how much each connection of a matrix deserves to grow."""
        return tf.abs(gathered)


class _LastGradients(GradientMeter):
    def gather(self, optimizer: Any, total: Any, gradient: tf.Tensor, variable: Any) -> None:
        optimizer.assign(total, gradient)

    def prepare(self) -> None:
        if not self.has_gathered():
            raise ValueError(
                "RigL has seen no gradient yet, so it cannot tell which connections should grow. "
                "Let the schedule fire for the second time behind a step of training."
            )


@dataclass(frozen=True)
class SET:
    """Grows connections at random.

    Args:
        share: float in `(0, 1)`. As of `RigL`. Defaults to `0.3`.
        seed: int. Another seed, other connections. Defaults to `0`.

    Raises:
        ValueError: If `share` is out of range.

    Reference: Mocanu et al., 2018, "Scalable Training of Artificial Neural Networks with Adaptive
    Sparse Connectivity inspired by Network Science" (https://arxiv.org/abs/1707.04780).
    """

    share: float = 0.3
    seed: int = 0

    name: ClassVar[str] = "set"

    def __post_init__(self) -> None:
        _check_share(self.share)

    def meter(self, model: keras.Layer, chosen: list[Target]) -> Meter:
        """Returns what measures which connections would grow."""
        return _Nothing()

    def growth(self, gathered: tf.Tensor | None, index: int, like: tf.Tensor, step: Any) -> Any:
        """Returns how much each connection of a matrix deserves to grow."""
        return draw(self.seed, index, tf.shape(like), step)


class _Nothing(Meter):
    def scores(self, index: int, weights: tf.Tensor) -> tf.Tensor:
        return weights


_CLASSES: dict[str, Any] = {"rigl": RigL, "set": SET}


def serialize_regrowth(regrow: Regrowth | None) -> Config | None:
    """Returns a regrowth as plain data."""
    return None if regrow is None else {"name": regrow.name, **vars(regrow)}


def deserialize_regrowth(config: Config | None) -> Regrowth | None:
    """Returns the regrowth that `serialize_regrowth` wrote.

    Raises:
        ValueError: If the name or a setting is not known or out of range.
    """
    if config is None:
        return None
    config = dict(config)
    name = config.pop("name", None)
    if name not in _CLASSES:
        raise ValueError(f"`regrow` is one of {', '.join(_CLASSES)}. Received: {name!r}")
    try:
        found: Regrowth = _CLASSES[name](**config)
    except TypeError as error:
        raise ValueError(f"Wrong settings for {name}: {sorted(config)} ({error})") from None
    return found


def share_at(regrow: Regrowth, schedule: Schedule, step: int) -> float:
    """Returns the share of connections that moves at a step."""
    begin, end = getattr(schedule, "begin_step", 0), last_step(schedule)
    if end is None or end <= begin:
        return regrow.share
    along = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return regrow.share / 2 * (1.0 + math.cos(math.pi * along))


def moved(
    magnitudes: tf.Tensor, mask: tf.Tensor, growth: tf.Tensor, sparsity: tf.Tensor, share: tf.Tensor
) -> tf.Tensor:
    """Returns a mask in which the smallest connections made place for others.

    Args:
        magnitudes: float32 matrix, of the weights.
        mask: bool matrix, what is connected now.
        growth: float32 matrix, not negative: how much each deserves to grow.
        sparsity: float32 scalar, the share that is not connected afterwards.
        share: float32 scalar, the share of connections that goes.

    Returns:
        bool matrix.
    """
    shape = tf.shape(magnitudes)
    kept = count_kept(tf.size(magnitudes), sparsity)
    going = tf.cast(tf.round(tf.cast(kept, tf.float32) * share), tf.int32)

    def largest(scores: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        (chosen,) = keep_largest([tf.reshape(scores, (1, -1))], count)
        return tf.reshape(chosen, shape)

    stays = largest(tf.where(mask, magnitudes, -1.0), tf.maximum(kept - going, 1)) & mask
    places = kept - tf.math.count_nonzero(stays, dtype=tf.int32)
    grown = largest(tf.where(stays, -1.0, growth), tf.maximum(places, 1)) & ~stays & (places > 0)
    return stays | grown
