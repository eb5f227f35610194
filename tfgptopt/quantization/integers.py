"""The integers of rounded weights, as training saw them: what every exporter stores."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model.current import current
from tfgptopt.quantization import layers, quantizers, rounding
from tfgptopt.quantization.rounding import Grid


@dataclass(frozen=True, eq=False)
class Integers:
    """A rounded weight of a layer.

    Attributes:
        variable: The variable that it is the weight of.
        integers: int8 array of the shape of the variable.
        scale: float32 array of the shape that the grid gives scales.
        grid: Which weights share a scale.
    """

    variable: keras.Variable
    integers: np.ndarray
    scale: np.ndarray
    grid: Grid


def read_integers(layer: keras.Layer) -> list[Integers]:
    """Reads the weights of a dressed or finalized layer as the integers that training saw.

    Args:
        layer: A layer with a quantization spec.

    Returns:
        List of `Integers`: the kernel or table, then the own head of a ReversibleEmbedding.
    """
    target = layers.rounded_target(layer)
    attached = quantizers.quantizers_of(layer)
    found = []
    for i, (variable, grid) in enumerate(quantizers.grids_of(target, layer.quantization_spec)):
        values = current(layer, variable)
        if attached:  # Dressed, or stored in 16 bits, which do not tell their scale.
            scale = attached[i].compute_scale(values)
        else:
            scale = rounding.found_scale(values, grid)
        integers, used = rounding.quantize(values, grid, scale)
        if scale is None or not (
            layers.is_dressed(layer) or _gives(variable, integers, used, grid)
        ):
            warnings.warn(
                f"{variable.path} changed since `finalize`: it is rounded to {grid.bits} bits "
                "again, which it was not trained for.",
                stacklevel=3,
            )
        found.append(Integers(variable, integers.numpy().astype(np.int8), used.numpy(), grid))
    return found


def _gives(variable: keras.Variable, integers: tf.Tensor, scale: tf.Tensor, grid: Grid) -> bool:
    """Returns whether integers and scales are what a variable holds, in its own precision."""
    values = tf.convert_to_tensor(variable.value)
    expected = tf.cast(rounding.dequantize(integers, scale, grid), values.dtype)
    return bool(tf.reduce_all(tf.equal(values, expected)))
