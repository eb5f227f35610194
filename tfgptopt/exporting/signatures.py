"""What a model reads, as the signature of its exported function, and SavedModels of such."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras.src.export.export_utils import get_input_signature


@dataclass(frozen=True)
class Endpoint:
    """A signature of a SavedModel.

    Attributes:
        name: Its name.
        function: What it computes.
        signature: The inputs, by position.
    """

    name: str
    function: Callable[..., Any]
    signature: Sequence[Any]


def input_signature(model: keras.Model) -> list[Any]:
    """Returns the arguments of a model's call with a free batch size.

    Args:
        model: A Functional or Sequential model, or one of a class of its own that was called.

    Returns:
        List of structures of `tf.TensorSpec`, one for each positional argument.

    Raises:
        ValueError: If it has not declared what it reads, and was never called.
    """

    def spec(tensor: keras.KerasTensor) -> tf.TensorSpec:
        return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name=tensor.name)

    if getattr(model, "inputs", None):
        # A Sequential that was never called has inputs, but no `input`.
        inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        return [keras.tree.map_structure(spec, inputs)]
    try:
        # Keras' own: from the shapes of the first call.
        found = get_input_signature(model)
    except (TypeError, ValueError):
        raise ValueError(
            f"'{model.name}' has no declared inputs and was never called on data: call it on a "
            "batch, `model(x)`, or build it as a Sequential or Functional model, before exporting."
        ) from None
    return [keras.tree.map_structure(_as_spec, one) for one in found]


def _as_spec(spec: Any) -> tf.TensorSpec:
    return tf.TensorSpec((None, *spec.shape[1:]), spec.dtype, name=spec.name)


def save_endpoints(endpoints: Iterable[Endpoint], path: str | Path, **tracked: Any) -> None:
    """Writes a SavedModel.

    Keras' `ExportArchive` traces each function twice: once for its variables, and once to write it.

    Args:
        endpoints: Its signatures. The first is `serving_default` as well.
        path: The folder.
        **tracked: Modules and variables that the functions use, by names of attributes.
    """
    module, signatures = tf.Module(), {}
    for name, value in tracked.items():
        setattr(module, name, value)
    for one in endpoints:
        traced = tf.function(one.function, input_signature=one.signature, autograph=False)
        setattr(module, one.name, traced)
        signatures[one.name] = traced
        signatures.setdefault("serving_default", traced)
    tf.saved_model.save(module, str(path), signatures=signatures)
