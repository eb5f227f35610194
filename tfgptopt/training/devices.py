"""Chooses the devices that training is spread over."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

STRATEGIES = ("auto", "default", "mirrored", "workers", "tpu")
_TF_CONFIG = (
    'TF_CONFIG looks like {"cluster": {"worker": ["host1:port", "host2:port"]}, '
    '"task": {"type": "worker", "index": 0}}, with the same cluster and another index on each '
    "worker."
)


def _has_tpu() -> bool:
    return bool(tf.config.list_physical_devices("TPU")) or "TPU_NAME" in os.environ


def _tpu_strategy() -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
    except (ValueError, tf.errors.NotFoundError) as error:
        raise ValueError(f"No TPU was found: {error}") from None
    return tf.distribute.TPUStrategy(resolver)


def workers_of(config: str) -> list[str]:
    """Returns the addresses of the workers that a `TF_CONFIG` names, the chief first.

    Raises:
        ValueError: If it is no JSON, or does not say who the workers are and which one this is.
    """
    try:
        parsed: Any = json.loads(config)
        cluster, task = parsed.get("cluster", {}), parsed.get("task", {})
        workers = [*cluster.get("chief", []), *cluster.get("worker", [])]
        of_type, index = cluster.get(task.get("type", "worker"), []), task.get("index", 0)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"TF_CONFIG cannot be read ({error}). {_TF_CONFIG} Received: {config!r}"
        ) from None
    if not workers:
        return []
    addresses = all(isinstance(one, str) and ":" in one for one in workers)
    if not addresses or len(set(workers)) < len(workers):
        raise ValueError(f"TF_CONFIG needs one address for each worker. {_TF_CONFIG} "
                         f"Received: {workers}")  # fmt: skip
    if set(cluster) - {"chief", "worker"}:
        raise ValueError(
            "Only clusters of workers are supported, with a chief or without. Received in "
            f"TF_CONFIG: {sorted(cluster)}"
        )
    if not isinstance(index, int) or not 0 <= index < len(of_type):
        raise ValueError(
            f"`task` in TF_CONFIG is none of the cluster. {_TF_CONFIG} Received: {task}"
        )
    return workers


def _workers() -> list[str]:
    return workers_of(os.environ.get("TF_CONFIG") or "{}")


def _workers_strategy() -> tf.distribute.Strategy:
    workers = _workers()
    if not workers:
        raise ValueError(f"The environment has no TF_CONFIG that names workers. {_TF_CONFIG}")
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        if "must be configured at program startup" in str(error):
            raise ValueError(
                "The strategy of several workers has to be made before TensorFlow does anything "
                "else: call `strategy()` first of all in the program."
            ) from None
        raise


def _mirrored_strategy() -> tf.distribute.Strategy:
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) < 2:
        raise ValueError(
            "Mirrored training needs two devices or more. Found: "
            f"{', '.join(device.name for device in devices)}"
        )
    # Without a GPU there is no NCCL to add gradients up.
    cross = None
    if devices[0].device_type == "CPU":
        cross = tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy([d.name for d in devices], cross_device_ops=cross)


def strategy(name: str = "auto") -> tf.distribute.Strategy:
    """Returns a `tf.distribute` strategy for the devices at hand; `describe` says which and why.

    Batch sizes are global everywhere: a batch of `fit` is spread over all replicas of all workers.

    Args:
        name: `"auto"` takes `MultiWorkerMirroredStrategy` where the environment's `TF_CONFIG`
            names more than one worker, `TPUStrategy` where there is a TPU, `MirroredStrategy` for
            several GPUs, and the default strategy (one device) otherwise. `"default"`,
            `"mirrored"`, `"workers"` and `"tpu"` insist on one. Defaults to `"auto"`.

    Returns:
        `tf.distribute.Strategy`. Make and compile the model inside its `scope()`, and call
        `tfgptopt.training.prepare(model)` there.

    Raises:
        ValueError: If the name is not known, its devices are not there, or `TF_CONFIG` cannot be
            understood.

    Example:

    ```python
    from tfgptopt.training import describe, prepare, strategy

    chosen = strategy("auto")
    print(describe(chosen))
    with chosen.scope():
        model = keras_hub.models.GPT2CausalLM.from_preset("small_gpt", preprocessor=None)
        model.compile(optimizer="adamw")
        prepare(model)
    model.fit(data, callbacks=[QuantizationAwareTraining(Int8())])
    ```
    """
    if name not in STRATEGIES:
        raise ValueError(f"`name` must be one of {', '.join(STRATEGIES)}. Received: {name!r}")
    if name == "workers" or (name == "auto" and len(_workers()) > 1):
        return _workers_strategy()
    if name == "tpu" or (name == "auto" and _has_tpu()):
        return _tpu_strategy()
    if name == "mirrored" or (name == "auto" and len(tf.config.list_logical_devices("GPU")) > 1):
        return _mirrored_strategy()
    return tf.distribute.get_strategy()


def is_chief(chosen: tf.distribute.Strategy | None = None) -> bool:
    """Returns whether this process writes: on several workers, only the first does.

    Args:
        chosen: The strategy. Defaults to `None`: the one of the scope.

    Example:

    ```python
    from tfgptopt.training import is_chief, strategy

    chosen = strategy("auto")
    if is_chief(chosen):
        tfgptopt.export(model, "gpt.tflite")
    ```
    """
    chosen = chosen or tf.distribute.get_strategy()
    if not isinstance(chosen, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    resolver = chosen.cluster_resolver
    if resolver.task_type in (None, "chief"):
        return True
    has_chief = "chief" in resolver.cluster_spec().jobs
    return not has_chief and resolver.task_id == 0


@contextlib.contextmanager
def for_chief(chosen: tf.distribute.Strategy, path: Path) -> Iterator[Path]:
    """Gives the chief a path to write to, and other workers a temporary one that goes again.

    All workers have to take part in what is written: some of it is computed by all together.

    Args:
        chosen: The strategy.
        path: Where the chief writes.
    """
    if is_chief(chosen):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="tfgptopt-") as folder:
        yield Path(folder) / path.name


def describe(chosen: tf.distribute.Strategy) -> str:
    """Returns one line that says which strategy was chosen, why, and over how many replicas."""
    count = chosen.num_replicas_in_sync
    over = f"{count} replica{'s' if count > 1 else ''}"
    if isinstance(chosen, tf.distribute.TPUStrategy):
        return f"TPUStrategy, {over}: there is a TPU"
    if isinstance(chosen, tf.distribute.MultiWorkerMirroredStrategy):
        task = chosen.cluster_resolver
        return (
            f"MultiWorkerMirroredStrategy, {over} on {chosen.extended._num_workers} workers, this "
            f"is {task.task_type} {task.task_id}: TF_CONFIG names them"
        )
    if isinstance(chosen, tf.distribute.MirroredStrategy):
        kind = chosen.extended.worker_devices[0].rpartition("device:")[2].split(":")[0]
        return f"MirroredStrategy, {over}: {count} {kind}s"
    return f"default strategy, {over}: one device"
