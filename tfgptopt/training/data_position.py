"""Where a `fit` is in its data, and how another one gets there.

A `fit` that goes on reads the batches again that were trained on, as Keras read them, and drops
them: whatever the data is made of (shuffled, repeated, generated, spread over replicas), what comes
next is what would have come. That they are the same batches is checked by a hash of all of them,
which the compiled step adds up.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.eager import context

from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.retracing import retrace
from tfgptopt.training.sharding import each_worker

_WATCH = "_tfgptopt_data_watch"
_Hash = tuple[int, int]


def _hash_tensor(x: tf.Tensor) -> tf.Tensor:
    """Returns an int64 hash of a tensor that depends on the order; of no numbers, its size."""
    if x.dtype.is_floating:
        x = tf.bitcast(tf.cast(x, tf.float32), tf.int32)
    if not (x.dtype.is_integer or x.dtype.is_bool):
        return tf.size(x, tf.int64)
    flat = tf.cast(tf.reshape(x, (-1,)), tf.int64)
    return tf.reduce_sum(flat * (2 * tf.range(tf.size(flat, tf.int64)) + 1))


def _hash_batch(data: Any) -> tf.Tensor:
    """Returns an int64 hash of a batch on one replica."""
    total = tf.zeros((), tf.int64)
    for i, x in enumerate(tf.nest.flatten(data)):
        if isinstance(x, tf.Tensor):
            total += _hash_tensor(x) * (2 * i + 1)
    return total


class DataWatch:
    """Adds up a hash of all batches that a model is trained on, in its compiled step.

    Args:
        model: A compiled model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._is_first = bool(model.distribute_strategy.extended.should_checkpoint)
        read = tf.VariableSynchronization.ON_READ
        with strategy_scope(model):
            self._total = tf.Variable(
                0, False, dtype=tf.int64, synchronization=read,
                aggregation=tf.VariableAggregation.SUM,
            )  # fmt: skip
            self._count = tf.Variable(
                0, False, dtype=tf.int64, synchronization=read,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )  # fmt: skip
        train_step = model.train_step

        def watched_step(data: Any) -> Any:
            added = self._total.assign_add(_hash_batch(data) * (2 * self._count + 1))
            with tf.control_dependencies([added]):  # Where data ends, nothing is counted.
                self._count.assign_add(1)
            return train_step(data)

        # Not through Keras' own __setattr__: there is nothing to track.
        object.__setattr__(model, "train_step", watched_step)
        object.__setattr__(model, _WATCH, self)
        retrace(model)

    @property
    def seen(self) -> _Hash:
        """Number and hash of the batches since the beginning."""
        return int(self._count.read_value()), int(self._total.read_value())

    def start(self, seen: _Hash) -> None:
        """Goes on from a number of batches and their hash."""
        count, total = seen
        self._count.assign(count)
        # One replica goes on with all of it: TensorFlow would give each a share, as a float.
        for i, part in enumerate(getattr(self._total, "values", [self._total])):
            part.assign(total if i == 0 and self._is_first else 0)


def data_watch(model: keras.Model) -> DataWatch:
    """Returns the watch of a model, made on the first call."""
    found = getattr(model, _WATCH, None)
    return found if isinstance(found, DataWatch) else DataWatch(model)


@dataclass(frozen=True, eq=False)
class RunningFit:
    """What a `fit` of Keras works with while it runs.

    Attributes:
        frame: Its frame on the stack.
        batches: Its iterator over the batches of an epoch.
        callbacks: All callbacks that it calls.
    """

    frame: FrameType
    batches: Any
    callbacks: list[keras.callbacks.Callback]

    @classmethod
    def of_caller(cls) -> RunningFit:
        """Returns the `fit` that calls a callback now.

        Raises:
            ValueError: If none does, as in a loop of one's own.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            names = frame.f_locals
            if frame.f_code.co_name == "fit" and {"epoch_iterator", "callbacks"} <= set(names):
                return cls(frame, names["epoch_iterator"], names["callbacks"].callbacks)
            frame = frame.f_back
        raise ValueError(
            "A Checkpoint follows the batches of `model.fit`, and was called by something else. "
            f"(Keras {keras.__version__}; versions since 3.15 are known to work.)"
        )

    def is_below(self, frame: FrameType | None) -> bool:
        """Returns whether the `fit` still runs, below a frame of the stack."""
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False

    def check_order(self) -> None:
        """Raises if batches come in an order that nobody could repeat.

        Raises:
            ValueError: If they are shuffled without a seed.
        """
        adapter = self.batches.data_adapter
        shuffled = bool(getattr(adapter, "_shuffle", False))  # Keras itself shuffles arrays.
        unseeded = shuffled and context.global_seed() is None
        if unseeded or _has_unseeded_shuffle(getattr(adapter, "_dataset", None)):
            raise ValueError(
                "The data is shuffled without a seed, so that a training that is resumed could not "
                "see the batches that it would have seen. Call `keras.utils.set_random_seed(...)` "
                "before the data is made, or `dataset.shuffle(..., seed=...)`; or train with "
                "`shuffle=False`."
            )

    def replay(self, epochs: int, batches: int, strategy: tf.distribute.Strategy) -> _Hash:
        """Reads the batches again that were trained on; the `fit` then goes on behind them.

        Args:
            epochs: Whole epochs.
            batches: Batches of the epoch that follows.
            strategy: The strategy of the model.

        Returns:
            Number and hash of the batches, of all workers.

        Raises:
            ValueError: If the data ends before.
        """
        hashing = tf.function(_hash_batch, reduce_retracing=True, autograph=False)
        count = total = 0
        execution = self.batches.steps_per_execution

        def read(source: Iterator[Any]) -> None:
            nonlocal count, total
            for i in range(execution):
                try:
                    batch = next(source)
                except (StopIteration, tf.errors.OutOfRangeError):
                    if i == 0:
                        raise StopIteration from None
                    return
                hashes = sum(int(hashing(part)) for part in _of_replicas(batch, strategy))
                total = _wrapped(total + hashes * (2 * count + 1))
                count += 1

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of Keras, where data ends; it was said before.
            for _ in range(epochs):
                with self.batches.catch_stop_iteration():
                    for _, _, source in self.batches:
                        read(source)
        if batches:
            self._begin_at(batches // execution, read)
        return count, _wrapped(sum(each_worker(strategy, total)))

    def _begin_at(self, executions: int, read: Callable[[Iterator[Any]], None]) -> None:
        """Lets the next epoch begin behind some executions of the step, which are read here."""
        rest = self.batches._enumerate_iterator()
        for _ in range(executions):
            try:
                _, _, source = next(rest)
                read(source)
            except StopIteration:
                raise ValueError(
                    "The data has fewer batches than the training has seen when the checkpoint was "
                    "written: it is another data set."
                ) from None

        def once() -> Iterator[Any]:
            del self.batches._enumerate_iterator
            return rest

        self.batches._enumerate_iterator = once


def _of_replicas(batch: Any, strategy: tf.distribute.Strategy) -> list[list[Any]]:
    """Returns the tensors of a batch as each replica gets them."""
    found = [strategy.experimental_local_results(x) for x in tf.nest.flatten(batch)]
    count = max(map(len, found))
    return [
        [x if isinstance(x := values[i % len(values)], tf.Tensor) else None for values in found]
        for i in range(count)
    ]


def _wrapped(number: int) -> int:
    """Returns what int64 makes of a number."""
    return (number + 2**63) % 2**64 - 2**63


def _has_unseeded_shuffle(dataset: Any) -> bool:
    if dataset is None or not hasattr(dataset, "_inputs"):
        return False
    seeds = [getattr(dataset, name, None) for name in ("_seed", "_seed2")]
    if type(dataset).__name__ == "_ShuffleDataset" and all(
        isinstance(seed, tf.Tensor) and int(seed) == 0 for seed in seeds
    ):
        return True
    return any(_has_unseeded_shuffle(one) for one in dataset._inputs())
