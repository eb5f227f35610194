"""Takes the training-time dress off a model and makes its effects permanent."""

from __future__ import annotations

import keras

from tfgptopt.model import masks
from tfgptopt.model.changing import changing
from tfgptopt.model.current import check_mergeable, has_adapters, merge_adapters
from tfgptopt.model.finite import check_finite_weights
from tfgptopt.model.history import rewrite
from tfgptopt.model.techniques import techniques_of
from tfgptopt.pruning import checkpointing
from tfgptopt.pruning.penalties import penalized, remove_penalties
from tfgptopt.quantization import layers


def finalize(model: keras.Layer) -> keras.Layer:
    """Turns a dressed model back into plain layers that hold what was trained.

    Pruned weights are exactly zero, quantized weights lie exactly on their grid, LoRA adapters are
    merged, penalties of `Regularization` are gone, every layer has its own class again; only the
    experts of a mixture go on computing through layers, with the same numbers. `tfgptopt.export`
    still knows how the weights were rounded.

    Args:
        model: A model that was pruned or made quantize-aware, by a callback or a function, or has
            LoRA adapters.

    Returns:
        The same model.

    Raises:
        ValueError: If nothing of the model is dressed, or a weight is NaN or infinite. The model
            is as it was then.

    Example:

    ```python
    schedule = PolynomialDecay(0.0, 0.5, begin_step=100, end_step=900)
    gpt.fit(data, callbacks=[Pruning(schedule), QuantizationAwareTraining(Int8())])
    tfgptopt.finalize(gpt)
    gpt.save_to_preset("finalized_gpt")
    ```
    """
    dressed = [layer for layer in model._flatten_layers() if layers.is_dressed(layer)]
    held = [variable for variable in model.variables if masks.masked(variable)]
    adapted = [layer for layer in model._flatten_layers() if has_adapters(layer)]
    with_penalty = [variable for variable in model.variables if penalized(variable)]
    if not dressed and not held and not adapted and not with_penalty:
        raise ValueError(
            f"The model '{model.name}' was neither pruned nor made quantize-aware and has no LoRA "
            "adapters, or it was finalized already. There is nothing to finalize."
        )
    check_mergeable(model)
    check_finite_weights(model)
    if dressed or held:
        rewrite(model, techniques_of(model))
    with changing(model):
        for variable in held:
            masks.detach(variable)
        for layer in dressed:
            layers.undress(layer)
        for layer in adapted:
            if has_adapters(layer):
                merge_adapters(layer)
        remove_penalties(with_penalty)
        checkpointing.forget(model)
    return model
