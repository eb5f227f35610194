"""Makes Keras trace a model again after its layers were changed."""

from __future__ import annotations

from typing import Any

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


def strategy_scope(model: keras.Layer) -> Any:
    """Returns the scope of the `tf.distribute` strategy that a model was made in."""
    import tensorflow as tf

    strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
    return strategy.scope()
