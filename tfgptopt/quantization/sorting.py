"""Sorts the neurons of feed-forward networks by how large they get.

Where a product is cut along its inputs, each part has a scale of its own. Neurons can stand in any
order; in that of their size, those of one part are alike, and large ones cost only each other.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import batches_of, rows_of
from tfgptopt.calibration.watching import advancing, observe_all, short
from tfgptopt.families import follow, known_families, layout_of
from tfgptopt.model import masks
from tfgptopt.model.changing import changing
from tfgptopt.model.current import full_precision, has_adapters
from tfgptopt.model.precision import is_half
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.turning import is_turned
from tfgptopt.model.types import Data
from tfgptopt.quantization.layers import spec_of
from tfgptopt.terminal.progress import stage

# How far what a model gives may move, in standard deviations, when floats are summed in another
# order.
_TOLERANCE, _TOLERANCE_OF_HALF = 2e-3, 0.5


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of a network: the products that make them, and the one that reads them."""

    makers: tuple[Target, ...]
    down: Target

    def reorder(self, order: np.ndarray) -> None:
        """Puts neurons in another order, which changes nothing of what the network gives."""
        for target in self.makers:
            matrix = target.to_matrix(full_precision(target.variable)).numpy()
            target.assign(matrix[:, order])
            bias = getattr(target.layer, "bias", None)
            if bias is not None:
                values = full_precision(bias).numpy().reshape(-1)[order]
                bias.assign(values.reshape(bias.shape))
        self.down.assign(self.down.to_matrix(full_precision(self.down.variable)).numpy()[order])


def neurons_of(model: keras.Layer) -> list[Neurons]:
    """Returns the neurons of each feed-forward network of a decoder that is no mixture.

    Args:
        model: A causal LM of KerasHub, or its backbone.

    Raises:
        ValueError: If its family is not known, or all of its networks are mixtures of experts.
    """
    backbone, layout = getattr(model, "backbone", model), layout_of(model)
    if layout is None:
        raise ValueError(
            f"There is no layout of {type(backbone).__name__}, so nobody knows where its neurons "
            f"are. Sorting knows {', '.join(known_families())}, and what "
            "`tfgptopt.families.register` was given. Leave sorting out."
        )
    found, mixtures = [], 0
    for block in follow(backbone, layout.blocks):
        gate, up, down = (part and part.of(block) for part in (layout.gate, layout.up, layout.down))
        if up is None or down is None:
            mixtures += 1
            continue
        makers = tuple(target_of(layer) for layer in (gate, up) if layer is not None)
        found.append(Neurons(makers, target_of(down)))
    if not found:
        raise ValueError(
            f"{type(backbone).__name__} is a mixture of experts, whose neurons are not sorted: few "
            "tokens reach each of them. Leave sorting out."
        )
    if mixtures:
        warnings.warn(f"The neurons of {mixtures} mixtures of experts stay as they are: few tokens "
                      "reach each of them.", stacklevel=3)  # fmt: skip
    return found


def _check_plain(found: list[Neurons]) -> None:
    """Raises unless all that would be reordered is plain, and there once.

    Raises:
        ValueError: If a layer is rounded, pruned, adapted, turned, shared or of another shape.
    """
    every = [(target, neurons) for neurons in found for target in (*neurons.makers, neurons.down)]
    times = Counter(id(target.layer) for target, _ in every)
    for target, neurons in every:
        count = neurons.down.matrix_shape[0]
        outputs = count if target is neurons.down else target.matrix_shape[1]
        reasons = {
            "is used in several places": times[id(target.layer)] > 1,
            "is rotated already: sort first": is_turned(target.layer),
            "is rounded already: sort first": spec_of(target.layer) is not None,
            "is pruned, in a pattern that has an order: prune after sorting": masks.masked(
                target.variable
            ),
            "has LoRA adapters: merge them first": has_adapters(target.layer),
            f"gives {outputs} features, and {count} are read": outputs != count,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"{target.variable.path} {reason}, or leave sorting out.")


def sort_neurons(model: keras.Layer, data: Data) -> keras.Layer:
    """Sorts the neurons of feed-forward networks by their largest activation, in place.

    In floats the model computes what it computed before. It is for `down` in parts that have scales
    of their own, `Int8(activation_blocks=4)`: neurons of a part are alike then. Mixtures of experts
    stay as they are.

    Args:
        model: A causal LM of KerasHub, plain, or its backbone.
        data: Calibration data: a finite `tf.data.Dataset` or arrays, as `fit` takes them.

    Returns:
        The same model.

    Raises:
        ValueError: If the family is not known or a mixture of experts, a layer is rounded, pruned,
            rotated, shared or has LoRA adapters, or the model would not compute the same. The model
            is as it was then.

    Example:

    ```python
    tfgptopt.quantization.sort_neurons(gpt, windows)
    tfgptopt.quantize_aware(gpt, Int8(activation_blocks=4), "feedforward_output")
    ```

    Reference: Dettmers et al., 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
    Scale" (https://arxiv.org/abs/2208.07339), which keeps large features apart from the rest.
    """
    found = neurons_of(model)
    _check_plain(found)
    batches = batches_of(data)
    sizes: dict[Any, np.ndarray] = {}

    def gather(target: Target, rows: tf.Tensor) -> None:
        largest = tf.reduce_max(tf.abs(rows), 0).numpy()
        sizes[target.key] = np.maximum(sizes.get(target.key, 0.0), largest)

    downs = [neurons.down for neurons in found]
    work = sum(rows_of(batch) for batch in batches) * sum(target.size for target in downs)
    with stage("Sorting neurons, reading", work) as shown:
        observe_all(model, downs, batches, advancing(gather, shown, lambda t: t.size))
    batch = short(model, batches[0])
    expected = _given(model, batch)
    with changing(model):
        orders = [np.argsort(-sizes[one.down.key], kind="stable") for one in found]
        for neurons, order in zip(found, orders, strict=True):
            neurons.reorder(order)
        moved = np.abs(_given(model, batch) - expected).max() / expected.std()
        if not moved <= _tolerance(model):
            for neurons, order in zip(found, orders, strict=True):
                neurons.reorder(np.argsort(order))
            raise ValueError(
                f"Sorting would move what '{model.name}' gives by {moved:.2g} standard deviations, "
                "so something else reads its neurons that its family's layout does not tell of. "
                "Leave sorting out."
            )
    return model


def _given(model: keras.Layer, batch: Data) -> np.ndarray:
    results = tf.nest.flatten(model(batch, training=False))
    return np.concatenate([np.asarray(one, np.float32).reshape(-1) for one in results])


def _tolerance(model: keras.Layer) -> float:
    half = ("float16", "bfloat16")
    computes = any(layer.compute_dtype in half for layer in model._flatten_layers())
    return _TOLERANCE_OF_HALF if computes or any(map(is_half, model.variables)) else _TOLERANCE
