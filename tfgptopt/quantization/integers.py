"""The integers of rounded weights, as training saw them: what every exporter stores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model.current import current
from tfgptopt.quantization import layers, quantizers, rounding
from tfgptopt.quantization.rounding import Grid

# Numbers that are rounded together.
_AT_ONCE = 1 << 24


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
        used = rounding.absmax_scale(values, grid) if scale is None else scale
        integers = _encoded(values, used, grid)
        if scale is None or not (
            layers.is_dressed(layer) or _gives(variable, integers, used, grid)
        ):
            warnings.warn(
                f"{variable.path} changed since `finalize`: it is rounded to {grid.bits} bits "
                "again, which it was not trained for.",
                stacklevel=3,
            )
        found.append(Integers(variable, integers, used.numpy(), grid))
    return found


def _parts(shape: Sequence[int], grid: Grid) -> Iterator[tuple[slice, ...]]:
    """Yields parts of a weight that have scales of their own, all together the whole.

    A table of many tokens is large, and would be held several times while it is rounded.
    """
    axis = next((i for i in range(len(shape)) if i not in grid.axes), None)
    if axis is None or grid.block_size is not None:
        yield (slice(None),) * len(shape)
        return
    step = max(1, _AT_ONCE * shape[axis] // max(1, int(np.prod(shape))))
    for begin in range(0, shape[axis], step):
        yield (slice(None),) * axis + (slice(begin, begin + step),)


def _encoded(values: tf.Tensor, scale: tf.Tensor, grid: Grid) -> np.ndarray:
    """Returns the integers of a weight, int8 of its shape."""
    found = np.empty(values.shape, np.int8)
    for part in _parts(values.shape, grid):
        one = scale if grid.block_size is not None else scale[part]
        found[part] = grid.encode(values[part], one).numpy()
    return found


def _gives(variable: keras.Variable, integers: np.ndarray, scale: tf.Tensor, grid: Grid) -> bool:
    """Returns whether integers and scales are what a variable holds, in its own precision."""
    values = tf.convert_to_tensor(variable.value)
    for part in _parts(values.shape, grid):
        one = scale if grid.block_size is not None else scale[part]
        floats = rounding.dequantize(tf.cast(integers[part], tf.float32), one, grid)
        if not bool(tf.reduce_all(values[part] == tf.cast(floats, values.dtype))):
            return False
    return True
