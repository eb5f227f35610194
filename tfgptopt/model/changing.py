"""Changes the layers of a model: in the scope of its strategy, and Keras traces it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import keras
import tensorflow as tf

from tfgptopt.model.carrying import carry
from tfgptopt.model.retracing import retrace


def strategy_scope(model: keras.Layer) -> AbstractContextManager[object]:
    """Returns the scope of the `tf.distribute` strategy that a model was made in."""
    strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
    scope: AbstractContextManager[object] = strategy.scope()
    return scope


def build_optimizer(model: keras.Model) -> None:
    """Makes the variables of a model's optimizer before its step is traced.

    Keras makes them inside the first step, which TensorFlow then traces twice.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and model.built and not optimizer.built:
        with strategy_scope(model):
            optimizer.build(model.trainable_variables)


@contextlib.contextmanager
def changing(model: keras.Layer) -> Iterator[None]:
    """Lets layers be changed: in the scope of the model's strategy, traced again afterwards.

    Masks and scales that are on the model then travel with its weights.

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
        carry(model)
        retrace(model)


def snapshot(model: keras.Layer) -> Callable[[], None]:
    """Copies what the variables of a model hold, and returns what puts it back."""
    before = [(v, keras.ops.convert_to_numpy(v.value)) for v in model.variables]

    def restore() -> None:
        for variable, value in before:
            variable.assign(value)

    return restore
