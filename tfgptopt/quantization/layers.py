"""Layers that compute with rounded weights and rounded inputs while they train.

A layer is dressed by giving the object a subclass of its own class. It keeps its variables, name,
path and place in the model; `isinstance` stays true, and its checkpoints load into plain layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.model.current import (
    current,
    drop_adapters,
    full_precision,
    has_adapters,
    without_adapters,
)
from tfgptopt.model.dressing import dressed_class, put_on, register_mixin, take_off, worn_by
from tfgptopt.model.precision import is_half
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.types import Config
from tfgptopt.quantization import quantizers, rounding
from tfgptopt.quantization.quantizers import Quantizer
from tfgptopt.quantization.rounding import Grid
from tfgptopt.quantization.row_rounding import fake_quantize_rows
from tfgptopt.quantization.specs import Spec, deserialize_spec, serialize_spec

_SPEC = "quantization_spec"
_IS_HEAD = "quantized_as_head"


class QuantizeAwareMixin:
    """Runs the layer's own `call` on rounded weights and inputs."""

    quantization_spec: Spec
    quantized_as_head: bool
    _row_axes: tuple[int, ...]
    _row_blocks: int

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)  # type: ignore[misc]
        _resolve(self)

    def rounded(self, quantizer: Quantizer | None = None) -> tf.Tensor:
        """Returns rounded weights, with a straight-through gradient to the variables."""
        quantizer = quantizer or quantizers.quantizers_of(self)[0]  # type: ignore[arg-type]
        if quantizer.given is not None:
            return tf.convert_to_tensor(quantizer.given)
        return quantizer.fake_quantize(current(self, quantizer.variable))

    def _round_rows(self, inputs: tf.Tensor) -> Any:
        if self.quantization_spec.activations is None:
            return inputs
        return fake_quantize_rows(inputs, self._row_axes, self._row_blocks)

    def _call_rounded(
        self, quantizer: Quantizer, inputs: tf.Tensor, *args: object, **kwargs: object
    ) -> Any:
        mapping = [(quantizer.variable, self.rounded(quantizer))]
        with without_adapters(self), keras.StatelessScope(state_mapping=mapping):
            return super().call(inputs, *args, **kwargs)  # type: ignore[misc]

    def call(self, inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
        quantizer = quantizers.quantizers_of(self)[0]  # type: ignore[arg-type]
        return self._call_rounded(quantizer, self._round_rows(inputs), *args, **kwargs)

    def get_config(self) -> Config:
        config = super().get_config()  # type: ignore[misc]
        spec = serialize_spec(self.quantization_spec)
        return {**config, _SPEC: spec, _IS_HEAD: self.quantized_as_head}

    @classmethod
    def from_config(cls, config: Config) -> keras.Layer:
        config = dict(config)
        spec = deserialize_spec(config.pop(_SPEC))
        is_head = config.pop(_IS_HEAD, False)
        layer: keras.Layer = super().from_config(config)  # type: ignore[misc]
        layer.quantization_spec, layer.quantized_as_head = spec, is_head
        return layer


class QuantizeAwareEmbeddingMixin(QuantizeAwareMixin):
    """The same for tables: rows are rounded after the look-up, the head rounds its inputs."""

    def call(self, inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
        reverse = bool(args[0]) if args else bool(kwargs.get("reverse", False))
        found = quantizers.quantizers_of(self)  # type: ignore[arg-type]
        if reverse:
            # The head of an untied embedding is another variable, the last.
            return self._call_rounded(found[-1], self._round_rows(inputs), *args, **kwargs)
        plain = self.compute_dtype == "float32" and found[0].given is None  # type: ignore[attr-defined]
        if plain and not has_adapters(self):  # type: ignore[arg-type]
            # A row's scale depends on that row alone, so rounding only the rows in use is exact.
            rows = super(QuantizeAwareMixin, self).call(inputs, *args, **kwargs)  # type: ignore[misc]
            return _keep_mask(rows, _round_looked_up(found[0], rows, inputs))
        return self._call_rounded(found[0], inputs, *args, **kwargs)

    def as_head(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns logits, for models that multiply with a table whose class gives none."""
        found = quantizers.quantizers_of(self)[0]  # type: ignore[arg-type]
        rows = self._round_rows(keras.ops.cast(inputs, "float32"))
        logits = keras.ops.matmul(rows, keras.ops.transpose(self.rounded(found)))
        return keras.ops.cast(logits, found.variable._dtype)


def _round_looked_up(quantizer: Quantizer, rows: tf.Tensor, ids: Any) -> tf.Tensor:
    """Rounds rows of a table as the table itself is rounded."""
    if quantizer.grid.block_size is not None:
        flat = tf.reshape(rows, (-1, rows.shape[-1]))
        rounded = _round_blocks_of_rows(quantizer, flat, tf.reshape(ids, (-1,)))
        return tf.ensure_shape(tf.reshape(rounded, tf.shape(rows)), rows.shape)
    grid = replace(quantizer.grid, axes=(-1,))
    scale_of: Any = None
    if quantizer.kept is not None:
        kept = quantizer.grid.representable(tf.convert_to_tensor(quantizer.kept.value))
        looked_up = tf.gather(kept, tf.cast(ids, tf.int32))
        scale_of = lambda _: looked_up  # noqa: E731
    elif quantizer.method != "absmax":
        scale_of = lambda values: rounding.mse_scale(values, grid)  # noqa: E731
    return rounding.fake_quantize(rows, grid, scale_of, quantizer.method == "learned")


def _round_blocks_of_rows(quantizer: Quantizer, rows: tf.Tensor, ids: Any) -> tf.Tensor:
    """Rounds rows `(tokens, width)` of a table in blocks."""
    grid = quantizer.grid
    scale_of: Any = None
    if quantizer.kept is not None:
        kept = grid.representable(tf.convert_to_tensor(quantizer.kept.value))
        looked_up = tf.gather(kept, tf.cast(ids, tf.int32), axis=2)
        scale_of = lambda _: looked_up  # noqa: E731
    elif quantizer.method != "absmax":
        scale_of = lambda values: rounding.mse_scale(values, grid)  # noqa: E731
    return rounding.fake_quantize(rows, grid, scale_of, quantizer.method == "learned")


def _keep_mask(source: Any, result: Any) -> Any:
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        result._keras_mask = mask
    return result


_TABLES = (keras.layers.Embedding, keras.layers.ReversibleEmbedding)
register_mixin(
    QuantizeAwareMixin, "QuantizeAware", 1, (keras.layers.Dense, keras.layers.EinsumDense)
)
register_mixin(QuantizeAwareEmbeddingMixin, "QuantizeAware", 1, _TABLES)


def _mixin_for(layer: keras.Layer) -> type:
    embedding = isinstance(layer, keras.layers.Embedding)
    return QuantizeAwareEmbeddingMixin if embedding else QuantizeAwareMixin


def rounded_target(layer: keras.Layer) -> Target:
    """Returns the target of a layer with a quantization spec, with the role it was rounded in."""
    target = target_of(layer)
    return replace(target, role="head") if layer.quantized_as_head else target


def _resolve(layer: keras.Layer) -> None:
    """Finds the axes of a dressed layer that was built."""
    target = rounded_target(layer)
    layer._row_axes = target.row_axes
    layer._row_blocks = quantizers.row_blocks_of(target, layer.quantization_spec)
    quantizers.attach(target, layer.quantization_spec)


def is_dressed(layer: keras.Layer) -> bool:
    """Returns whether a layer computes with rounded weights."""
    return isinstance(layer, QuantizeAwareMixin)


def dress(target: Target, spec: Spec) -> None:
    """Makes the layer of a target quantize-aware, in place."""
    layer = target.layer
    layer.quantization_spec = spec
    layer.quantized_as_head = target.role == "head"
    put_on(layer, _mixin_for(layer))
    _resolve(layer)


def dressed_copy(layer: keras.Layer, spec: Spec) -> keras.Layer:
    """Returns a quantize-aware layer with the configuration of one that is not built yet."""
    config = {**layer.get_config(), _SPEC: serialize_spec(spec), _IS_HEAD: False}
    made: Any = dressed_class(type(layer), (*worn_by(layer), _mixin_for(layer)))
    copy: keras.Layer = made.from_config(config)
    return copy


def undress(layer: keras.Layer) -> None:
    """Writes the rounded weights into a dressed layer and gives it back its own class.

    LoRA adapters are merged. The spec stays on the layer, for exporters.
    """
    for quantizer in quantizers.quantizers_of(layer):
        weights = current(layer, quantizer.variable)
        if is_half(quantizer.variable):
            # 16 bits hold integer times scale near enough to find the integer, not the scale.
            quantizer.hold(weights)
        quantizer.variable.assign(quantizer.rounded(weights))
    if not is_half(target_of(layer).variable):
        quantizers.detach(layer)
    take_off(layer, _mixin_for(layer))
    if has_adapters(layer):
        drop_adapters(layer)


def forget(layer: keras.Layer) -> None:
    """Makes a plain layer forget that it was ever rounded."""
    for name in (_SPEC, _IS_HEAD):
        if hasattr(layer, name):
            delattr(layer, name)
    quantizers.detach(layer)


@contextmanager
def finalized_for_a_while(dressed: list[Any]) -> Iterator[None]:
    """Makes dressed layers plain ones with rounded weights, and dresses them again at the end."""
    found = [quantizer for layer in dressed for quantizer in quantizers.quantizers_of(layer)]
    values = [full_precision(quantizer.variable) for quantizer in found]
    classes = [type(layer) for layer in dressed]
    with ExitStack() as stack:
        try:
            for layer in dressed:
                for quantizer in quantizers.quantizers_of(layer):
                    quantizer.variable.assign(layer.rounded(quantizer))
                stack.enter_context(without_adapters(layer))
                take_off(layer, _mixin_for(layer))
            yield
        finally:
            for layer, own in zip(dressed, classes, strict=True):
                layer.__class__ = own
            for quantizer, value in zip(found, values, strict=True):
                quantizer.variable.assign(value)


def spec_of(layer: keras.Layer) -> Spec | None:
    """Returns the spec that a layer was trained or finalized with, or `None`."""
    return getattr(layer, _SPEC, None)


def grid_of(layer: keras.Layer) -> Grid | None:
    """Returns what the weight of a layer was trained or finalized to, or `None`."""
    spec = spec_of(layer)
    if spec is None:
        return None
    target = rounded_target(layer)
    return quantizers.grids_of(target, spec)[0][1]
