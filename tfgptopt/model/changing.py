"""Changes the layers of a model: in the scope of its strategy, and Keras traces it again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import keras
import tensorflow as tf

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


def strategy_scope(model: keras.Layer) -> AbstractContextManager[object]:
    """Returns the scope of the `tf.distribute` strategy that a model was made in."""
    strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
    scope: AbstractContextManager[object] = strategy.scope()
    return scope


@contextlib.contextmanager
def changing(model: keras.Layer) -> Iterator[None]:
    """Lets layers be changed: in the scope of the model's strategy, traced again afterwards.

    What fails half-way is traced again too: whoever changes a model also puts it back.

    Example:

    ```python
    with changing(model):
        layer.trainable = False
    ```
    """
    try:
        with strategy_scope(model):
            yield
    finally:
        retrace(model)
