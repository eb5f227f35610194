"""Rounds kernels by GPTQ, block by block; blocks that were rounded before are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.correcting import grams_by_block
from tfgptopt.calibration.journal import Arrays, Journal
from tfgptopt.calibration.routing import warn_of_unread
from tfgptopt.model import masks
from tfgptopt.model.current import current, has_adapters
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Data
from tfgptopt.quantization import layers, quantizers, rounding
from tfgptopt.quantization.gptq import gptq
from tfgptopt.quantization.specs import Spec

_STAGE = "gptq"


def round_blocks(
    model: keras.Layer, chosen: list[tuple[Target, Spec]], data: Data, journal: Journal
) -> None:
    """Rounds kernels by GPTQ; each block sees what the rounded ones before it give.

    Args:
        model: A built Keras 3 model, which is changed.
        chosen: Kernels and how they are rounded.
        data: Calibration data.
        journal: Has the blocks that were rounded before, and is given the others.

    Raises:
        ValueError: If the model cannot read the data, or a layer has LoRA adapters.
    """
    if not chosen:
        return
    specs = {id(target.variable): spec for target, spec in chosen}
    targets, unread = [target for target, _ in chosen], []
    known = journal.known(_STAGE)
    for number, members in grams_by_block(model, targets, data, "GPTQ", known):
        found: Arrays = journal.read(_STAGE, number) if number <= known else {}
        for i, (target, parts) in enumerate(members):
            spec = specs[id(target.variable)]
            if number > known:
                new = _rounded(target, spec, parts)
                found |= {f"{name}_{i}": array for name, array in new.items()}
            its = {name: found[f"{name}_{i}"] for name in ("integers", "scale", "unread")}
            _hold(target, spec, its)
            unread += [target.parts[j] for j in its["unread"]]
        if number > known:
            journal.write(_STAGE, number, found)
    warn_of_unread(unread, "rounded to nearest", stacklevel=4)


def bytes_of_blocks(chosen: list[tuple[Target, Spec]]) -> int:
    """Returns how many bytes a journal of all blocks takes, about."""
    size = 0
    for target, spec in chosen:
        grid = quantizers.grids_of(target, spec)[0][1]
        size += target.size + 4 * int(np.prod(grid.scale_shape(target.variable.shape)))
    return size


def _rounded(
    target: Target, spec: Spec, parts: Iterable[tuple[Target, np.ndarray | None]]
) -> Arrays:
    """Returns the integers of a kernel, or of each expert's, their scale, and who read nothing."""
    if has_adapters(target.layer):
        raise ValueError(
            f"{target.path} has LoRA adapters, which GPTQ cannot move. Merge them first, or use "
            'the method "mse".'
        )
    grid = replace(quantizers.grids_of(target, spec)[0][1], axes=(0,))
    weights, kept = current(target.layer, target.variable), None
    integers, scales, unread = [], [], []
    for i, (part, gram) in enumerate(parts):
        matrix = part.to_matrix(weights).numpy()
        if masks.masked(target.variable):
            kept = part.to_matrix(target.variable.constraint.mask.value).numpy().astype(bool)
        if gram is None:
            unread.append(i)
            scale = rounding.mse_scale(tf.constant(matrix), grid).numpy()
        else:
            matrix, scale = gptq(matrix, gram, grid.bits, grid.block_size, kept)
        steps, _ = rounding.quantize(tf.constant(matrix), grid, tf.constant(scale))
        integers.append(steps.numpy().astype(np.min_scalar_type(-grid.limit)))
        scales.append(scale)
    return {
        "integers": np.concatenate(integers, axis=1),
        "scale": np.concatenate(scales, axis=-1),
        "unread": np.asarray(unread, np.int64),
    }


def _hold(target: Target, spec: Spec, found: Arrays) -> None:
    """Gives a layer its rounded weights and their scale, and dresses it."""
    grid, scale = quantizers.grids_of(target, spec)[0][1], found["scale"]
    integers = tf.constant(found["integers"].astype(np.float32))
    by_matrix = replace(grid, axes=(0,))
    matrix = rounding.dequantize(integers, tf.constant(scale), by_matrix).numpy()
    if len(found["unread"]):  # Their scale rounds them when the layer computes.
        weights = current(target.layer, target.variable)
        parts, width = target.parts, matrix.shape[1] // len(target.parts)
        for i in found["unread"]:
            matrix[:, i * width : (i + 1) * width] = parts[i].to_matrix(weights).numpy()
    target.variable.assign(target.from_matrix(matrix))
    if grid.block_size is None:
        scale = scale.reshape(grid.scale_shape(target.variable.shape))
    layers.dress(target, spec)
    quantizer = quantizers.quantizers_of(target.layer)[0]
    quantizer.hold(current(target.layer, target.variable), scale)
