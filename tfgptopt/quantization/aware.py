"""Dresses the layers of a model for quantization-aware training."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model.changing import retrace, strategy_scope
from tfgptopt.model.targets import Role, Selector, Target, select
from tfgptopt.quantization import layers, quantizers, rounding
from tfgptopt.quantization.bit_allocation import BitAllocation
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


def check_plain(targets: list[Target]) -> None:
    """Raises if a layer rounds its weights already.

    Raises:
        ValueError: If one does, with what it rounds to.
    """
    for target in targets:
        if layers.is_dressed(target.layer):
            raise ValueError(
                f"{target.path} is quantize-aware already, with {target.layer.quantization_spec}. "
                "Call `tfgptopt.finalize(model)` first to change it."
            )


def check_fits(targets: list[Target], spec: Spec) -> None:
    """Raises unless weights can be rounded to a spec.

    Raises:
        ValueError: If a weight is NaN or infinite, a block does not divide its inputs, or a scale
            is to be learned for a weight that is frozen.
    """
    inputs = {t.path: t.matrix_shape[0] for t in targets if t.role == "kernel"}
    size = spec.block_size
    wrong = {path: n for path, n in inputs.items() if size is not None and n % size}
    if wrong:
        fitting = [n for n in range(32, min(inputs.values()) + 1, 32)
                   if not any(inputs % n for inputs in inputs.values())]  # fmt: skip
        path, count = next(iter(wrong.items()))
        raise ValueError(
            f"`block_size` must divide the inputs of each weight. {path} has {count}. Received: "
            f"block_size={size}. Of the multiples of 32, {fitting or 'none'} divide the inputs of "
            "all chosen weights. Give such a one, None, or other `targets`."
        )
    for target in targets:
        if not np.isfinite(keras.ops.convert_to_numpy(target.variable.value)).all():
            raise ValueError(f"{target.path} is NaN or infinite, so it has no scale.")
        if spec.scale == "learned" and getattr(target.layer, "lora_enabled", False):
            raise ValueError(
                f"{target.path} has LoRA adapters, and a learned scale needs the gradient of the "
                'weight itself. Use `scale="mse"`, or merge the adapters first.'
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
    with strategy_scope(model):
        for target, one in chosen:
            layers.dress(target, one)
            if one.scale == "learned":
                hold_scales([target.layer])
    retrace(model)
    return model


def hold_scales(dressed: list[keras.Layer]) -> None:
    """Keeps the scales of dressed layers as they are from now on. Call it in the strategy's scope.

    What a checkpoint holds goes before what the weights give.
    """
    for layer in dressed:
        for quantizer in quantizers.quantizers_of(layer):
            quantizer.hold(layers.weights_of(layer, quantizer))


def keep_found_scales(model: keras.Layer, selector: Selector | None) -> None:
    """Keeps the scales that finalized weights tell, where the spec's method gives others.

    Call it in the strategy's scope.
    """
    for target in select(model, selector, roles=_ROLES, frozen=True):
        for quantizer in quantizers.quantizers_of(target.layer):
            weights = layers.weights_of(target.layer, quantizer)
            found = rounding.found_scale(weights, quantizer.grid)
            if found is not None and bool(tf.reduce_any(found != quantizer.compute_scale(weights))):
                quantizer.hold(weights, found)
