"""Chooses the devices that training is spread over."""

from __future__ import annotations

import os

import tensorflow as tf

STRATEGIES = ("auto", "default", "mirrored", "tpu")


def _has_tpu() -> bool:
    return bool(tf.config.list_physical_devices("TPU")) or "TPU_NAME" in os.environ


def _tpu_strategy() -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
    except (ValueError, tf.errors.NotFoundError) as error:
        raise ValueError(f"No TPU was found: {error}") from None
    return tf.distribute.TPUStrategy(resolver)


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
    """Returns a `tf.distribute` strategy for the devices at hand.

    Args:
        name: `"auto"` takes `TPUStrategy` where there is a TPU, `MirroredStrategy` for several
            GPUs, and the default strategy (one device) otherwise. `"default"`, `"mirrored"` and
            `"tpu"` insist on one. Defaults to `"auto"`.

    Returns:
        `tf.distribute.Strategy`. Make and compile the model inside its `scope()`.

    Raises:
        ValueError: If the name is not known, or its devices are not there.

    Example:

    ```python
    from tfgptopt.training import strategy

    with strategy("auto").scope():
        model = keras_hub.models.GPT2CausalLM.from_preset("small_gpt", preprocessor=None)
        model.compile(optimizer="adamw")
    model.fit(data, callbacks=[QuantizationAwareTraining(Int8())])
    ```
    """
    if name not in STRATEGIES:
        raise ValueError(f"`name` must be one of {', '.join(STRATEGIES)}. Received: {name!r}")
    if name == "tpu" or (name == "auto" and _has_tpu()):
        return _tpu_strategy()
    if name == "mirrored" or (name == "auto" and len(tf.config.list_logical_devices("GPU")) > 1):
        return _mirrored_strategy()
    return tf.distribute.get_strategy()


def describe(chosen: tf.distribute.Strategy) -> str:
    """Returns one line that says which strategy was chosen, and over how many replicas."""
    if isinstance(chosen, tf.distribute.TPUStrategy):
        kind = "TPUStrategy"
    elif isinstance(chosen, tf.distribute.MirroredStrategy):
        kind = "MirroredStrategy"
    else:
        kind = "default strategy"
    count = chosen.num_replicas_in_sync
    return f"{kind}, {count} replica{'s' if count > 1 else ''}"
