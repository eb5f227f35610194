"""Gives every worker its own rows, and lets all of them end together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.model.types import Data

_Policy = tf.data.experimental.AutoShardPolicy


def worker_count(chosen: tf.distribute.Strategy) -> int:
    """Returns the number of workers of a strategy, 1 for all but those of several workers."""
    if not isinstance(chosen, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    return int(chosen.extended._num_workers)


def shard(
    rows: tf.data.Dataset, batch_size: int, chosen: tf.distribute.Strategy | None = None
) -> tf.data.Dataset:
    """Returns batches of the rows of this worker alone, for `fit`.

    Datasets of batches need no sharding: `fit` of a model that was prepared takes its worker's part
    of each batch. But then every worker reads everything. Call this in front of what is expensive
    to read: each worker goes on with every n-th row, no row is with two of them, and all end after
    the same number of batches.

    Args:
        rows: `tf.data.Dataset` of single rows, in the same order on all workers: shuffle with a
            seed.
        batch_size: int. Rows of a batch over all replicas of all workers; what is left at the end
            is dropped.
        chosen: The strategy. Defaults to `None`: the one of the scope.

    Returns:
        `tf.data.Dataset` of this worker's batches, `batch_size` divided by the number of workers
        in size. Its `auto_shard_policy` is `OFF`, by which `fit` of a prepared model knows it.

    Raises:
        ValueError: If the batch does not divide evenly.

    Example:

    ```python
    from tfgptopt.training import shard, strategy

    data = shard(corpus.train.unbatch(), batch_size=8, chosen=strategy("auto"))
    model.fit(data)
    ```
    """
    chosen = chosen or tf.distribute.get_strategy()
    replicas, workers = chosen.num_replicas_in_sync, worker_count(chosen)
    if not isinstance(batch_size, int) or batch_size < 1 or batch_size % replicas:
        raise ValueError(
            f"`batch_size` is the global one and must be a multiple of {replicas}, the number of "
            f"replicas. Received: {batch_size!r}"
        )
    if workers == 1:
        return rows.batch(batch_size, drop_remainder=True)
    index = chosen.cluster_resolver.task_id + (chosen.cluster_resolver.task_type == "worker") * (
        "chief" in chosen.cluster_resolver.cluster_spec().jobs
    )
    groups = rows.batch(workers, drop_remainder=True)  # The same number for each worker.
    own = groups.map(lambda *row: tf.nest.map_structure(lambda one: one[index], _bare(row)))
    return _with_policy(own.batch(batch_size // workers, drop_remainder=True), _Policy.OFF)


def _bare(row: tuple[Any, ...]) -> Any:
    return row[0] if len(row) == 1 else row


def _policy(dataset: tf.data.Dataset) -> Any:
    return dataset.options().experimental_distribute.auto_shard_policy


def _with_policy(dataset: tf.data.Dataset, policy: Any) -> tf.data.Dataset:
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy
    return dataset.with_options(options)


def over_workers(dataset: Any, chosen: tf.distribute.Strategy) -> Any:
    """Returns what all workers read of a dataset together.

    Each takes its rows of every batch: TensorFlow's own choice may be to share by files, which
    need not have the same number of rows. Batches of a worker's own, as `shard` makes them, stay.
    """
    if not isinstance(dataset, tf.data.Dataset):
        return dataset
    if _policy(dataset) != _Policy.OFF:
        shared = _with_policy(dataset, _Policy.DATA)
        return chosen.experimental_distribute_dataset(shared)
    local = len(chosen.extended.worker_devices)
    size = tf.nest.flatten(dataset.element_spec)[0].shape[0]
    if local > 1:
        dataset = dataset.rebatch(size // local, drop_remainder=True)
    return chosen.distribute_datasets_from_function(lambda context: dataset)


def check_together(chosen: tf.distribute.Strategy, dataset: Any, batches: int | None) -> None:
    """Raises on all workers if their data would not end together, or are not the same.

    Args:
        chosen: The strategy of several workers.
        dataset: What this worker reads.
        batches: Number of its batches, `None` if it is not known.

    Raises:
        ValueError: If another worker has another number of batches, or another first batch.
    """
    counts = of_workers(chosen, -1 if batches is None else batches)
    if len(set(counts)) > 1:
        raise ValueError(
            f"The workers' data end after {', '.join(map(str, counts))} batches (-1: not known), "
            "so some would wait for others for ever. Give all of them the same data, "
            f"`steps_per_epoch`, or `data.take({min(n for n in counts if n >= 0)})`; "
            "`tfgptopt.training.shard` makes parts that end together."
        )
    if not isinstance(dataset, tf.data.Dataset) or _policy(dataset) == _Policy.OFF:
        return  # Data of each worker's own.
    if len(set(of_workers(chosen, _first_batch(dataset)))) > 1:
        raise ValueError(
            "The workers read different data: their first batches differ. Each takes its part of "
            "every batch, so all need the same data in the same order: shuffle with a seed, or "
            "call `keras.utils.set_random_seed` with the same number on all workers. For parts of "
            "your own, use `tfgptopt.training.shard`."
        )


@tf.function(autograph=False)
def _gather(chosen: tf.distribute.Strategy, own: tf.Tensor) -> tf.Tensor:
    return chosen.gather(chosen.run(lambda: own), axis=0)


def of_workers(chosen: tf.distribute.Strategy, value: int) -> list[int]:
    """Returns a number of each worker, in their order; for each replica that it has."""
    return [int(one) for one in _gather(chosen, tf.constant([value], tf.int64)).numpy()]


def each_worker(chosen: tf.distribute.Strategy, value: int) -> list[int]:
    """Returns a number of each worker, in their order. All have to call it together."""
    if worker_count(chosen) == 1:
        return [int(value)]
    return of_workers(chosen, value)[:: len(chosen.extended.worker_devices)]


@contextlib.contextmanager
def together(chosen: tf.distribute.Strategy) -> Iterator[None]:
    """Lets all workers fail where one does, instead of waiting for it. Nothing inside may wait.

    Raises:
        ValueError: If the block raised one or an `OSError`, here or on another worker.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    failed = each_worker(chosen, failure is not None)
    if failure is not None:
        raise failure
    if any(failed):
        raise ValueError(f"Worker {failed.index(1)} cannot begin: see what it says.")


def _first_batch(dataset: tf.data.Dataset) -> int:
    """Returns a number that depends on the first batch."""
    digest = hashlib.blake2b(digest_size=7)
    for batch in dataset.take(1).as_numpy_iterator():
        for array in tf.nest.flatten(_present(batch)):
            digest.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little")


def _present(batch: Data) -> list[Any]:
    return [value for value in tf.nest.flatten(batch) if value is not None]
