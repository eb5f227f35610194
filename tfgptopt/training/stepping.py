"""The compiled step of a model on several replicas, and on batches in several parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import keras
import tensorflow as tf

from tfgptopt.model.types import Data
from tfgptopt.training.reducing import gathering, over_replicas, reduce_first, replica_count
from tfgptopt.training.sharding import worker_count

Kind = Literal["train", "test"]


def _tensors(data: Data) -> list[Any]:
    return [one for one in tf.nest.flatten(data) if one is not None]


def rows_of(data: Data) -> tf.Tensor:
    """Returns the number of rows of a batch, as a float."""
    return tf.cast(tf.shape(_tensors(data)[0])[0], tf.float32)


def _even(data: Data, parts: int) -> bool:
    """Returns whether it is known now that a batch divides into parts of equal size."""
    rows = _tensors(data)[0].shape[0]
    return rows is not None and rows > 0 and rows % parts == 0


class _Parts:
    """A batch in parts that follow each other.

    Args:
        data: Tensors whose first axis are rows.
        count: int. Number of parts.
        fixed: Whether all parts must have the same shape, as XLA needs it.

    Raises:
        ValueError: If they must, and cannot.
    """

    def __init__(self, data: Data, count: int, fixed: bool) -> None:
        self.count, self._data = count, data
        rows = _tensors(data)[0].shape[0]
        if fixed and rows is not None and rows % count:
            raise ValueError(
                f"With jit_compile, a batch must divide into accumulate={count} parts of one size "
                f"on each replica. Received: {rows} rows on a replica. Give batches of a multiple "
                "of it, with drop_remainder=True."
            )
        self._stacked = fixed or _even(data, count)

    def __getitem__(self, index: tf.Tensor) -> Data:
        def part(tensor: tf.Tensor) -> tf.Tensor:
            if self._stacked:
                rows = tensor.shape[0]
                size = -1 if rows is None else rows // self.count
                shape = [self.count, size, *tf.unstack(tf.shape(tensor))[1:]]
                stacked = tf.reshape(tensor, shape)
                stacked.set_shape([self.count, None if size < 0 else size, *tensor.shape[1:]])
                return stacked[index]
            rows = tf.shape(tensor)[0]
            return tensor[index * rows // self.count : (index + 1) * rows // self.count]

        return tf.nest.map_structure(lambda one: None if one is None else part(one), self._data)


class _TrainStep:
    """Trains on the part of a batch that one replica has. Called in that replica.

    The model's own `train_step` runs, with gradients kept back. Means over batches of different
    sizes are weighted by these sizes, so that replicas and parts give what the whole batch gives.

    Args:
        model: A compiled model.
        parts: int. Number of parts into which the batch is cut, one after the other.
    """

    def __init__(self, model: Any, parts: int) -> None:
        self._model, self._parts = model, parts
        self._missing: set[int] = set()  # Variables without a gradient, found while tracing.
        self._run = self._gradients
        if model.jit_compile:
            self._run = _compiled_in_replica(self._gradients)

    def __call__(self, data: Data) -> Any:
        model = self._model
        reduce_first(model.optimizer)
        weight, total = self._weights(data)
        gradients, logs = self._run(data, weight, total)
        model.optimizer.apply(gradients, model.trainable_variables)
        return logs

    def _of_part(self, data: Data) -> tf.Tensor:
        measure = getattr(self._model, "batch_weight", rows_of)
        return measure(data)

    def _weights(self, data: Data) -> tuple[Any, Any]:
        """Returns by how much this replica's batch counts, and all of them; `None` if evenly."""
        if _even(data, self._parts) and not hasattr(self._model, "batch_weight"):
            return None, None
        weight = self._of_part(data)
        return weight, over_replicas(weight)

    def _factor(self, weight: tf.Tensor, total: Any) -> tf.Tensor:
        # Keras divides the loss of each replica by their number.
        return tf.math.divide_no_nan(weight * float(replica_count()), total)

    def _gradients(self, data: Data, weight: Any, total: Any) -> tuple[list[Any], Any]:
        if self._parts > 1:
            return self._sum_over_parts(data, total), {}
        gradients, logs = self._once(data)
        if total is not None:
            factor = self._factor(weight, total)
            gradients = [_times(gradient, factor) for gradient in gradients]
        return gradients, logs

    def _once(self, data: Data) -> tuple[list[Any], Any]:
        """Runs the model's own step and returns its gradients, for all trainable variables."""
        model = self._model
        with gathering(model.optimizer) as gathered:
            logs = model.train_step(data)
        if len(gathered) != 1:
            raise ValueError(
                f"The `train_step` of '{model.name}' applies gradients {len(gathered)} times. On "
                "several replicas, or with `accumulate`, it has to do so once."
            )
        found = {id(variable): gradient for gradient, variable in zip(*gathered[0], strict=True)}
        return [found.get(id(variable)) for variable in model.trainable_variables], logs

    def _sum_over_parts(self, data: Data, total: Any) -> list[Any]:
        variables = self._model.trainable_variables
        parts = _Parts(data, self._parts, bool(self._model.jit_compile))

        def one(index: tf.Tensor, *sums: tf.Tensor) -> tuple[Any, ...]:
            part = parts[index]
            gradients, _ = self._once(part)
            self._missing = {i for i, one in enumerate(gradients) if one is None}
            factor = (
                1.0 / self._parts if total is None else self._factor(self._of_part(part), total)
            )
            added = [
                before
                if gradient is None
                else before + _times(tf.convert_to_tensor(gradient), factor)
                for before, gradient in zip(sums, gradients, strict=True)
            ]
            return index + 1, *added

        # A loop, not copies of the step: parts that do not depend on each other would run, and
        # fill the memory, at the same time.
        zeros = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
        _, *sums = tf.while_loop(
            lambda index, *_: index < self._parts,
            one,
            (tf.constant(0), *zeros),
            parallel_iterations=1,
        )
        return [None if i in self._missing else one for i, one in enumerate(sums)]


def _times(gradient: Any, factor: Any) -> Any:
    """Returns a gradient times a factor; what does not count may be NaN."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            _times(gradient.values, factor), gradient.indices, gradient.dense_shape
        )
    return tf.math.multiply_no_nan(gradient, tf.cast(factor, gradient.dtype))


def _test_step(model: Any) -> Callable[[Data], Any]:
    def step(data: Data) -> Any:
        return model.test_step(data)

    return _compiled_in_replica(step) if model.jit_compile else step


def _compiled_in_replica(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled by XLA for each replica by itself.

    XLA cannot hold variables of two devices in one program.
    """

    def with_replica(replica: Any, *args: Any) -> Any:
        return run(*args)

    compiled = tf.function(with_replica, jit_compile=True, autograph=False)

    def call(*args: Any) -> Any:
        # The number of the replica tells the calls of replicas apart: without it, TensorFlow 2.21
        # ran the calls of `evaluate` of all replicas on the first device.
        context = tf.distribute.get_replica_context()
        return compiled(context.replica_id_in_sync_group, *args)

    return call


class _Logs:
    """What a step returns, over all replicas: sums of metrics are added up before they divide.

    Keras' own is a mean over the means of replicas, which is another number where replicas have
    different numbers of rows or tokens.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._strategy = model, model.distribute_strategy

    def __call__(self, outputs: Any) -> Any:
        metrics = self._model.get_metrics_result()
        if not isinstance(outputs, dict):
            return metrics
        own = {name: value for name, value in outputs.items() if name not in metrics}
        mean = tf.distribute.ReduceOp.MEAN
        return {**metrics, **{n: self._strategy.reduce(mean, v, axis=None) for n, v in own.items()}}


def compiled(model: Any, kind: Kind, parts: int) -> Callable[[Any], Any]:
    """Returns the function that `fit` or `evaluate` calls with an iterator.

    Args:
        model: A compiled Keras model.
        kind: `"train"` or `"test"`.
        parts: int. Number of parts into which the batch of a replica is cut for training.
    """
    strategy = model.distribute_strategy
    step = _TrainStep(model, parts) if kind == "train" else _test_step(model)
    logs = _Logs(model)

    def in_replica(data: Data) -> Any:
        with _behind(data):
            return step(data)

    def once(data: Data) -> Any:
        with _behind(data):
            return logs(strategy.run(in_replica, args=(_without_optionals(data),)))

    many = int(model.steps_per_execution)
    if model.run_eagerly:
        return _in_python(once, many)
    once = tf.function(once, reduce_retracing=True, autograph=False)

    def several(iterator: Any) -> Any:
        # The first outside of the loop: it tells what the loop carries.
        outputs = once(iterator.get_next())
        if many == 1:
            return outputs

        def more(index: tf.Tensor, outputs: Any, following: Any) -> Any:
            return tf.logical_and(index < many, following.has_value())

        def run(index: tf.Tensor, outputs: Any, following: Any) -> Any:
            outputs = once(following.get_value())
            # Nothing is read ahead that this execution does not use.
            following = tf.cond(index + 1 < many, iterator.get_next_as_optional, lambda: following)
            return index + 1, outputs, following

        loop = (tf.constant(1), outputs, iterator.get_next_as_optional())
        return tf.while_loop(more, run, loop, parallel_iterations=1)[1]

    compiled_several = tf.function(several, reduce_retracing=True, autograph=False)
    in_python = _in_python(once, many)

    def function(iterator: Any) -> Any:
        kinds = (tf.data.Iterator, tf.distribute.DistributedIterator)
        return compiled_several(iterator) if isinstance(iterator, kinds) else in_python(iterator)

    return function if worker_count(strategy) == 1 else _among_workers(function)


def _among_workers(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Says in words what TensorFlow says of a worker that died."""

    def step(iterator: Any) -> Any:
        try:
            return function(iterator)
        except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
            said = [line for line in error.message.splitlines() if "task" in line or "peer" in line]
            raise RuntimeError(
                "Another worker of this training is gone, so that this one cannot go on. Start all "
                "workers again: with `tfgptopt.callbacks.Checkpoint` they go on behind the last "
                f"checkpoint. TensorFlow said: {'; '.join(said[:2]) or error.message}"
            ) from error

    return step


def _in_python(once: Callable[[Data], Any], many: int) -> Callable[[Any], Any]:
    def function(iterator: Any) -> Any:
        outputs = None
        for _, data in zip(range(many), iterator, strict=False):
            outputs = once(data)
        if outputs is None:
            raise StopIteration
        return outputs

    return function


def _behind(data: Data) -> Any:
    """Lets nothing run before the data are there.

    At their end, what does not read them would run before the error comes: the counter of steps,
    and the number of rows that a metric divides by.
    """
    return tf.control_dependencies(tf.nest.flatten(data, expand_composites=True))


def _without_optionals(data: Data) -> Data:
    """Returns data with nothing where Keras' adapters put an empty optional."""
    return keras.tree.map_structure(
        lambda one: None if isinstance(one, tf.experimental.Optional) else one, data
    )
