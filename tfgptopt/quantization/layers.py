"""Layers that compute with rounded weights and rounded inputs while they train.

A layer is dressed by giving the object a subclass of its own class. It keeps its variables, name,
path and place in the model; `isinstance` stays true, and its checkpoints load into plain layers.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfgptopt.quantization import rounding
from tfgptopt.quantization.specs import Int4, Int8, Spec
from tfgptopt.targets import Target, target_of

_SPEC = "quantization_spec"


def _full_precision(variable: Any) -> tf.Tensor:
    """Returns a variable's value without the cast of mixed precision."""
    value = variable.value
    if value.dtype != tf.as_dtype(variable._dtype):
        value = variable._value
    return tf.convert_to_tensor(value)


class QuantizeAwareMixin:
    """Runs the layer's own `call` on rounded weights and inputs."""

    quantization_spec: Spec
    _weight_axes: tuple[int, ...]
    _row_axes: tuple[int, ...]

    @property
    def quantized_variable(self) -> Any:
        """The variable that is rounded."""
        return self._kernel  # type: ignore[attr-defined]

    @property
    def quantization_bits(self) -> int:
        """Bits of the rounded variable."""
        return self.quantization_spec.bits

    def rounded(self) -> tf.Tensor:
        """Returns the rounded weights, with a straight-through gradient to the variable."""
        weights = _full_precision(self.quantized_variable)
        return rounding.fake_quantize(weights, self._weight_axes, self.quantization_bits)

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = rounding.fake_quantize_rows(inputs, self._row_axes)
        with keras.StatelessScope(state_mapping=[(self.quantized_variable, self.rounded())]):
            return super().call(inputs, *args, **kwargs)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        return {**config, _SPEC: serialize_spec(self.quantization_spec)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Layer:
        config = dict(config)
        spec = deserialize_spec(config.pop(_SPEC))
        plain = _plain_class(cls).from_config(config)
        _restore_when_built(plain, spec)
        return plain


class QuantizeAwareEmbeddingMixin(QuantizeAwareMixin):
    """The same for tables: rows are rounded after the look-up, the tied head rounds its inputs."""

    @property
    def quantized_variable(self) -> Any:
        return self._embeddings  # type: ignore[attr-defined]

    @property
    def quantization_bits(self) -> int:
        return self.quantization_spec.embedding_bits

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        reverse = bool(args[0]) if args else bool(kwargs.get("reverse", False))
        if reverse and not self.tie_weights:  # type: ignore[attr-defined]
            # The head of an untied embedding is another variable, which is not rounded.
            return super(QuantizeAwareMixin, self).call(inputs, *args, **kwargs)  # type: ignore[misc]
        if reverse:
            inputs = rounding.fake_quantize_rows(inputs, self._row_axes)
        elif self.compute_dtype == "float32":  # type: ignore[attr-defined]
            # A row's scale depends on that row alone, so rounding only the rows in use is exact.
            rows = super(QuantizeAwareMixin, self).call(inputs, *args, **kwargs)  # type: ignore[misc]
            return _keep_mask(rows, rounding.fake_quantize(rows, (-1,), self.quantization_bits))
        with keras.StatelessScope(state_mapping=[(self.quantized_variable, self.rounded())]):
            return super(QuantizeAwareMixin, self).call(inputs, *args, **kwargs)  # type: ignore[misc]


def _keep_mask(source: Any, result: Any) -> Any:
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        result._keras_mask = mask
    return result


_classes: dict[type, type] = {}


def _dressed_class(layer_class: type) -> type:
    """Returns the quantize-aware subclass of a layer class, made once for each class."""
    if layer_class not in _classes:
        embedding = issubclass(layer_class, keras.layers.Embedding)
        mixin = QuantizeAwareEmbeddingMixin if embedding else QuantizeAwareMixin
        # The name stays: checkpoints address the layers of a list by the name of their class.
        dressed = type(layer_class.__name__, (mixin, layer_class), {"__module__": __name__})
        register = keras.saving.register_keras_serializable
        registered = f"QuantizeAware{layer_class.__name__}"
        _classes[layer_class] = register("tfgptopt", registered)(dressed)
    return _classes[layer_class]


def _plain_class(dressed_class: type) -> Any:
    return dressed_class.__mro__[dressed_class.__mro__.index(QuantizeAwareMixin) + 1]


for _standard in (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
    keras.layers.ReversibleEmbedding,
):
    _dressed_class(_standard)


def _restore_when_built(layer: keras.Layer, spec: Spec) -> None:
    """Dresses a layer that was rebuilt from its config, as soon as it has weights."""
    build = layer.build

    def build_then_dress(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        layer.build = build
        dress(target_of(layer), spec)

    layer.build = build_then_dress


def is_dressed(layer: keras.Layer) -> bool:
    """Returns whether a layer computes with rounded weights."""
    return isinstance(layer, QuantizeAwareMixin)


def dress(target: Target, spec: Spec) -> None:
    """Makes the layer of a target quantize-aware, in place."""
    layer = target.layer
    layer.quantization_spec = spec
    layer._weight_axes = target.input_axes
    layer._row_axes = target.row_axes
    layer.__class__ = _dressed_class(type(layer))


def undress(layer: keras.Layer) -> None:
    """Writes the rounded weights into a dressed layer and gives it back its own class.

    The spec stays on the layer, for exporters.
    """
    layer.quantized_variable.assign(layer.rounded())
    layer.__class__ = _plain_class(type(layer))


def bits_of(layer: keras.Layer) -> int | None:
    """Returns the bits that a layer's weights were trained or finalized with, or `None`."""
    spec = getattr(layer, _SPEC, None)
    if spec is None:
        return None
    return spec.embedding_bits if isinstance(layer, keras.layers.Embedding) else spec.bits


def serialize_spec(spec: Spec) -> dict[str, Any]:
    """Returns a spec as plain data."""
    fields = {"embedding_bits": spec.embedding_bits} if isinstance(spec, Int4) else {}
    return {"name": type(spec).__name__.lower(), **fields}


def deserialize_spec(config: dict[str, Any]) -> Spec:
    """Returns the spec that `serialize_spec` wrote.

    Raises:
        ValueError: If the name or a field is not known.
    """
    config = dict(config)
    name = config.pop("name", None)
    classes: dict[Any, Any] = {"int8": Int8, "int4": Int4}
    if name not in classes:
        raise ValueError(f"A quantization spec is named int8 or int4. Received: {name!r}")
    try:
        return classes[name](**config)
    except TypeError as error:
        raise ValueError(f"Unknown setting for {name}: {sorted(config)} ({error})") from None
