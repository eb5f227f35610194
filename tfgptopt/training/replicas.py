"""Makes `fit` right on several replicas, and accumulates gradients, without a class of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.model.types import Data
from tfgptopt.training.reducing import inner_optimizers
from tfgptopt.training.sharding import check_together, of_workers, over_workers, worker_count
from tfgptopt.training.stepping import Kind, compiled

_ACCUMULATE = "_tfgptopt_accumulate"
# A class with this attribute calls `make_function` and `build_for` by itself.
PREPARED = "_tfgptopt_prepared"


def prepare(model: keras.Model, accumulate: int = 1) -> None:
    """Makes `fit` and `evaluate` of a model right on several replicas, in place.

    Keras alone fails there with `jit_compile` and with gradient accumulation, fails altogether on
    several workers, clips the gradients of each replica for itself, and logs means of means. From
    here on the model's own `train_step` runs inside of each replica, compiled there if it is
    compiled; gradients are added up over replicas before the optimizer clips and applies them; and
    metrics are added up before they divide. `Pruning`, `QuantizationAwareTraining` and `Distiller`
    call this where there is more than one replica. On one device nothing changes but for
    `accumulate`.

    Batch sizes are global: a batch of `fit` is spread over all replicas of all workers.

    Args:
        model: A Keras model, compiled now or later.
        accumulate: int. Into how many parts each batch is cut, which a step goes through one after
            the other before it updates the weights once: memory for a batch that many times
            smaller, the same update as for the whole. `optimizer.iterations` counts updates, and
            so do schedules and callbacks. For larger batches, `data.rebatch(new_size)`. Defaults to
            `1`.

    Raises:
        ValueError: If `accumulate` is no int of 1 or more; in `fit`, if a batch has fewer rows than
            there are replicas, or the optimizer has `gradient_accumulation_steps`.

    Example:

    ```python
    from tfgptopt.training import prepare, strategy

    with strategy("auto").scope():
        model = keras_hub.models.GPT2CausalLM.from_preset("small_gpt", preprocessor=None)
        model.compile(optimizer="adamw", jit_compile=True, steps_per_execution=2)
        prepare(model, accumulate=2)
    model.fit(data)
    ```
    """
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"`accumulate` must be an int >= 1. Received: {accumulate!r}")
    changed = accumulate_of(model) != accumulate
    object.__setattr__(model, _ACCUMULATE, accumulate)
    if not getattr(model, PREPARED, False):
        _wrap(model)
        object.__setattr__(model, PREPARED, True)
    if changed and model.train_function is not None:
        model.make_train_function(force=True)


def prepare_replicas(model: keras.Model) -> None:
    """Prepares a model that runs on more than one replica, if nobody has."""
    if replicas_of(model) > 1 and not getattr(model, PREPARED, False):
        prepare(model)


def replicas_of(model: keras.Model) -> int:
    """Returns the number of replicas of the strategy that a model was made in."""
    strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
    return int(strategy.num_replicas_in_sync)


def accumulate_of(model: keras.Model) -> int:
    """Returns into how many parts each batch of a model is cut."""
    return int(getattr(model, _ACCUMULATE, 1))


def _wrap(model: Any) -> None:
    make_train, make_test = model.make_train_function, model.make_test_function
    build = model._maybe_symbolic_build

    def make_train_function(force: bool = False) -> Any:
        return make_function(model, "train", make_train, force)

    def make_test_function(force: bool = False) -> Any:
        return make_function(model, "test", make_test, force)

    def maybe_symbolic_build(iterator: Any = None, data_batch: Data = None) -> None:
        build_for(model, build, iterator, data_batch)

    object.__setattr__(model, "make_train_function", make_train_function)
    object.__setattr__(model, "make_test_function", make_test_function)
    object.__setattr__(model, "_maybe_symbolic_build", maybe_symbolic_build)


def make_function(model: Any, kind: Kind, plain: Callable[..., Any], force: bool) -> Any:
    """Returns the compiled train or test step of a model: Keras' own on one device.

    Args:
        model: The model.
        kind: `"train"` or `"test"`.
        plain: Keras' own method that makes it.
        force: bool. Make it anew.

    Raises:
        ValueError: If the optimizer accumulates gradients in Keras' way.
    """
    parts = accumulate_of(model) if kind == "train" else 1
    if parts == 1 and replicas_of(model) == 1:
        return plain(force=force)
    name = f"{kind}_function"
    if getattr(model, name) is None or force:
        if kind == "train":
            _check_optimizer(model, parts)
        setattr(model, name, compiled(model, kind, parts))
    return getattr(model, name)


def _check_optimizer(model: Any, parts: int) -> None:
    """Raises if an optimizer accumulates by itself.

    Raises:
        ValueError: If it does.
    """
    for each in inner_optimizers(model.optimizer):
        steps = each.gradient_accumulation_steps
        if steps:
            raise ValueError(
                f"The optimizer has gradient_accumulation_steps={steps}, with which Keras "
                "synchronizes replicas inside of a condition, where TensorFlow cannot. Leave it "
                f"out, and call `tfgptopt.training.prepare(model, accumulate={steps})` with "
                f"batches {steps} times as large, such as `data.rebatch(...)`. Received: "
                f"accumulate={parts}, {replicas_of(model)} replicas"
            )


def build_for(model: Any, plain: Callable[..., Any], iterator: Any, data_batch: Data) -> None:
    """Builds what is not built, by the first batch of an iterator, before anything is traced.

    Raises:
        ValueError: If a batch cannot be spread over the replicas.
    """
    strategy = model.distribute_strategy
    if accumulate_of(model) == 1 and strategy.num_replicas_in_sync == 1:
        plain(iterator=iterator, data_batch=data_batch)
        return
    if iterator is not None:
        if worker_count(strategy) > 1:
            _share(strategy, iterator)
        for _, _, batches in iterator:
            first = next(iter(batches)) if isinstance(batches, list) else next(batches)
            data_batch = _local(strategy, first)
            _check_rows(strategy, first)
            break
    with strategy.scope():
        model._symbolic_build(data_batch=data_batch)


def _share(strategy: tf.distribute.Strategy, iterator: Any) -> None:
    """Lets workers share batches by rows, and checks that they read the same ones."""
    dataset = iterator.data_adapter.get_tf_dataset()
    check_together(strategy, dataset, iterator.num_batches)
    iterator._distributed_dataset = over_workers(dataset, strategy)


def _local(strategy: tf.distribute.Strategy, batch: Data) -> Data:
    """Returns the first replica's part of a batch."""
    return tf.nest.map_structure(
        lambda value: None if value is None else strategy.experimental_local_results(value)[0],
        batch,
    )


def _check_rows(strategy: tf.distribute.Strategy, batch: Data) -> None:
    """Raises on all workers if the part of one replica is empty.

    Raises:
        ValueError: If the first batch has fewer rows than there are replicas.
    """
    values = next(value for value in tf.nest.flatten(batch) if value is not None)
    count = strategy.num_replicas_in_sync
    parts = strategy.experimental_local_results(values)
    every = sum(int(part.shape[0]) for part in parts)
    if worker_count(strategy) > 1:
        every = sum(of_workers(strategy, every)) // len(parts)
    if every < count:
        raise ValueError(
            f"A batch of {every} rows cannot be spread over {count} replicas. Batch sizes are "
            f"global: give batches of {count} rows or more, best a multiple of {count}."
        )
