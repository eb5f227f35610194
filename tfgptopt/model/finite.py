"""Refuses weights that are NaN or infinite, which rounding would turn into plausible numbers."""

from __future__ import annotations

import keras
import tensorflow as tf


def _is_finite(variable: keras.Variable) -> bool:
    values = tf.convert_to_tensor(variable.value)
    if not values.dtype.is_floating:
        return True
    # A sum is not finite where one of its terms is not, and takes no memory; it may also overflow.
    if bool(tf.math.is_finite(tf.reduce_sum(tf.cast(values, tf.float32)))):
        return True
    return bool(tf.reduce_all(tf.math.is_finite(values)))


def check_finite_weights(model: keras.Layer) -> None:
    """Raises if a weight of a model is NaN or infinite.

    Raises:
        ValueError: If one is, with the paths of the first three.
    """
    wrong = [variable.path for variable in model.variables if not _is_finite(variable)]
    if wrong:
        raise ValueError(
            f"'{model.name}' has weights that are NaN or infinite: {', '.join(wrong[:3])} "
            f"({len(wrong)} in all). Its training diverged, or it was loaded so: go back to a "
            "checkpoint from before that."
        )
