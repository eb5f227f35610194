"""Dresses the layers of a model for quantization-aware training."""

from __future__ import annotations

import keras
import tensorflow as tf

from tfgptopt.model.changing import changing
from tfgptopt.model.current import current
from tfgptopt.model.targets import Role, Selector, Target, select, target_of
from tfgptopt.quantization import layers, quantizers, rounding
from tfgptopt.quantization.bit_allocation import BitAllocation
from tfgptopt.quantization.quantizers import check_fits
from tfgptopt.quantization.specs import Spec, check_spec

_ROLES: tuple[Role, ...] = ("kernel", "head", "embedding")


def check_setting(spec: Spec | BitAllocation) -> None:
    """Raises unless it is a spec, or one for each weight."""
    if not isinstance(spec, BitAllocation):
        check_spec(spec)


def chosen_specs(
    model: keras.Layer, spec: Spec | BitAllocation, selector: Selector | None
) -> list[tuple[Target, Spec]]:
    """Returns the weights of a model that are to be rounded, each with its spec.

    Raises:
        ValueError: If nothing matches, or a weight does not fit its spec.
    """
    targets = select(model, selector, roles=_ROLES, frozen=True)
    if isinstance(spec, BitAllocation):
        found = [(target, one) for target, one in spec.match(targets) if one is not None]
    else:
        found = [(target, spec) for target in targets]
    for one in dict.fromkeys(one for _, one in found):
        check_fits([target for target, its in found if its == one], one)
    return found


def check_plain(chosen: list[Target]) -> None:
    """Raises if a layer rounds its weights already.

    Raises:
        ValueError: If one does, with what it rounds to.
    """
    for target in chosen:
        if layers.is_dressed(target.layer):
            raise ValueError(
                f"{target.path} is quantize-aware already, with {target.layer.quantization_spec}. "
                "Call `tfgptopt.finalize(model)` first to change it."
            )


def quantize_aware(
    model: keras.Layer, spec: Spec | BitAllocation, targets: Selector | None = None
) -> keras.Layer:
    """Makes a model compute with rounded weights and rounded inputs, in place.

    `fit` then trains through the rounding (straight-through gradients), `evaluate` and `generate`
    show the quality that ships, and `tfgptopt.export` writes the same integers. Without training,
    this is post-training rounding to nearest; `tfgptopt.quantize` has better methods for that.

    Frozen weights are rounded too, and LoRA adapters are added to their weight before it is.
    Learned scales are trained by the callback `QuantizationAwareTraining`; without it they stay as
    they begin, with the smallest squared error.

    Args:
        model: A built Keras 3 model.
        spec: `Int8()` or `Int4()`, or what `tfgptopt.quantization.allocate` returned.
        targets: Selector of the weights. Defaults to `None`: kernels of Dense and EinsumDense and
            tables of Embedding and ReversibleEmbedding, wherever they are nested.

    Returns:
        The same model: same class, names, variables and checkpoints.

    Raises:
        ValueError: If `spec` is none or does not fit a weight, the model is not built, nothing
            matches, or a layer is quantize-aware already.

    Example:

    ```python
    tfgptopt.quantize_aware(gpt, Int4())
    gpt.fit(data)
    tfgptopt.export(gpt, "gpt.tflite")
    ```

    Reference: Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (https://arxiv.org/abs/1712.05877).
    """
    check_setting(spec)
    chosen = chosen_specs(model, spec, targets)
    check_plain([target for target, _ in chosen])
    with changing(model):
        for target, one in chosen:
            layers.dress(target, one)
            if one.scale == "learned":
                hold_scales([target.layer])
    return model


def quantize_aware_layer(layer: keras.Layer, spec: Spec) -> keras.Layer:
    """Makes one layer quantize-aware, for models that are built by hand.

    It saves to `.keras` and comes back as it was. `tfgptopt.quantize_aware` does the same for all
    layers of a model.

    Args:
        layer: Dense, EinsumDense, Embedding or ReversibleEmbedding, built or not.
        spec: `Int8()` or `Int4()`.

    Returns:
        The layer itself if it is built, or else a new one with its configuration: of the class of
        `layer`, with all of its methods.

    Raises:
        ValueError: If the layer is of another kind, quantize-aware already, or does not fit.

    Example:

    ```python
    model = keras.Sequential([
        quantize_aware_layer(keras.layers.Dense(64, activation="relu"), Int8()),
        keras.layers.Dense(10),
    ])
    ```
    """
    check_spec(spec)
    known = keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding
    if not isinstance(layer, known):
        raise ValueError(
            "`quantize_aware_layer` takes Dense, EinsumDense, Embedding or ReversibleEmbedding; "
            f"for a model or a layer of layers, call `tfgptopt.quantize_aware`. Received: {layer!r}"
        )
    if layers.is_dressed(layer):
        raise ValueError(f"{layer.name} is quantize-aware already. Received: {layer!r}")
    if layer.built:
        check_fits([target_of(layer)], spec)
        layers.dress(target_of(layer), spec)
        return layer
    return layers.dressed_copy(layer, spec)


def hold_scales(dressed: list[keras.Layer]) -> None:
    """Keeps the scales of dressed layers as they are from now on. Call it in the strategy's scope.

    What a checkpoint holds goes before what the weights give.
    """
    for layer in dressed:
        for quantizer in quantizers.quantizers_of(layer):
            quantizer.hold(current(layer, quantizer.variable))


def keep_found_scales(model: keras.Layer, selector: Selector | None) -> None:
    """Keeps the scales that finalized weights tell, where the spec's method gives others.

    Call it in the strategy's scope.
    """
    for target in select(model, selector, roles=_ROLES, frozen=True):
        for quantizer in quantizers.quantizers_of(target.layer):
            weights = current(target.layer, quantizer.variable)
            found = rounding.found_scale(weights, quantizer.grid)
            if found is not None and bool(tf.reduce_any(found != quantizer.compute_scale(weights))):
                quantizer.hold(weights, found)
