"""Dresses the layers of a model for quantization-aware training."""

from __future__ import annotations

import keras

from tfgptopt.quantization import layers
from tfgptopt.quantization.specs import Int4, Int8, Spec
from tfgptopt.retracing import retrace
from tfgptopt.targets import Selector, select


def check_spec(spec: Spec) -> None:
    """Raises if `spec` is no quantization spec.

    Raises:
        ValueError: If it is something else, such as the class instead of an instance.
    """
    if not isinstance(spec, Int8 | Int4):
        raise ValueError(
            f"`spec` must be Int8() or Int4(). Received: {spec!r} (of type {type(spec)})"
        )


def quantize_aware(model: keras.Layer, spec: Spec, targets: Selector | None = None) -> keras.Layer:
    """Makes a model compute with rounded weights and rounded inputs, in place.

    `fit` then trains through the rounding (straight-through gradients), `evaluate` and `generate`
    show the quality that ships, and `tfgptopt.export` writes the same integers. Without training,
    this is post-training rounding to nearest.

    Args:
        model: A built Keras 3 model.
        spec: `Int8()` or `Int4()`.
        targets: Selector of the weights. Defaults to `None`: kernels of Dense and EinsumDense and
            tables of Embedding and ReversibleEmbedding, wherever they are nested.

    Returns:
        The same model: same class, names, variables and checkpoints.

    Raises:
        ValueError: If `spec` is none, the model is not built, nothing matches, or a layer is
            quantize-aware already.

    Example:

    ```python
    tfgptopt.quantize_aware(gpt, Int4())
    gpt.fit(data)
    tfgptopt.export(gpt, "gpt.tflite")
    ```

    Reference: Jacob et al., 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (https://arxiv.org/abs/1712.05877).
    """
    check_spec(spec)
    chosen = select(model, targets, roles=("kernel", "head", "embedding"))
    for target in chosen:
        if layers.is_dressed(target.layer):
            raise ValueError(
                f"{target.path} is quantize-aware already, with {target.layer.quantization_spec}. "
                "Call `tfgptopt.finalize(model)` first to change it."
            )
    for target in chosen:
        layers.dress(target, spec)
    retrace(model)
    return model
