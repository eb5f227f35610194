"""Makes Keras trace a model again after its layers were changed."""

from __future__ import annotations

import keras

_FUNCTIONS = ("train", "test", "predict")


def retrace(model: keras.Layer) -> None:
    """Drops the compiled functions of a model and of the models inside it.

    Functions that exist are made anew at once, because `fit` fetches its train function before it
    calls `on_train_begin`.
    """
    for layer in model._flatten_layers():
        if not isinstance(layer, keras.Model):
            continue
        for name in _FUNCTIONS:
            if getattr(layer, f"{name}_function", None) is not None:
                getattr(layer, f"make_{name}_function")(force=True)
        if getattr(layer, "generate_function", None) is not None:
            layer.generate_function = None
