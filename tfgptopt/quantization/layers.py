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

from tfgptopt.model.targets import Target, target_of
from tfgptopt.quantization import quantizers, rounding
from tfgptopt.quantization.quantizers import Quantizer, full_precision
from tfgptopt.quantization.rounding import Grid
from tfgptopt.quantization.specs import Spec, deserialize_spec, serialize_spec

_SPEC = "quantization_spec"
_IS_HEAD = "quantized_as_head"


def adapters(layer: keras.Layer) -> tf.Tensor | None:
    """Returns what the LoRA adapters of a layer add to its weight, or `None` if it has none."""
    if not getattr(layer, "lora_enabled", False):
        return None
    kind = "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"
    first, second = (full_precision(getattr(layer, f"lora_{kind}_{part}")) for part in ("a", "b"))
    return (layer.lora_alpha / layer.lora_rank) * tf.matmul(first, second)


@contextmanager
def _without_adapters(layer: Any) -> Iterator[None]:
    """Runs a layer on its own weight alone, which its adapters were added to."""
    enabled = getattr(layer, "lora_enabled", False)
    if enabled:
        object.__setattr__(layer, "lora_enabled", False)
    try:
        yield
    finally:
        if enabled:
            object.__setattr__(layer, "lora_enabled", True)


def weights_of(layer: Any, quantizer: Quantizer) -> tf.Tensor:
    """Returns what a quantizer of a layer rounds: float32 weights, adapters merged."""
    weights = full_precision(quantizer.variable)
    main = quantizer is quantizers.quantizers_of(layer)[0]
    added = adapters(layer) if main else None
    return weights if added is None else weights + added


class QuantizeAwareMixin:
    """Runs the layer's own `call` on rounded weights and inputs."""

    quantization_spec: Spec
    quantized_as_head: bool
    _row_axes: tuple[int, ...]

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)  # type: ignore[misc]
        _resolve(self)

    def rounded(self, quantizer: Quantizer | None = None) -> tf.Tensor:
        """Returns rounded weights, with a straight-through gradient to the variables."""
        quantizer = quantizer or quantizers.quantizers_of(self)[0]  # type: ignore[arg-type]
        if quantizer.given is not None:
            return quantizer.given
        return quantizer.fake_quantize(weights_of(self, quantizer))

    def _round_rows(self, inputs: Any) -> Any:
        if self.quantization_spec.activations is None:
            return inputs
        return rounding.fake_quantize_rows(inputs, self._row_axes)

    def _call_rounded(self, quantizer: Quantizer, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mapping = [(quantizer.variable, self.rounded(quantizer))]
        with _without_adapters(self), keras.StatelessScope(state_mapping=mapping):
            return super().call(inputs, *args, **kwargs)  # type: ignore[misc]

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = quantizers.quantizers_of(self)[0]  # type: ignore[arg-type]
        return self._call_rounded(quantizer, self._round_rows(inputs), *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        spec = serialize_spec(self.quantization_spec)
        return {**config, _SPEC: spec, _IS_HEAD: self.quantized_as_head}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Layer:
        config = dict(config)
        spec = deserialize_spec(config.pop(_SPEC))
        is_head = config.pop(_IS_HEAD, False)
        layer: Any = super().from_config(config)  # type: ignore[misc]
        layer.quantization_spec, layer.quantized_as_head = spec, is_head
        return layer


class QuantizeAwareEmbeddingMixin(QuantizeAwareMixin):
    """The same for tables: rows are rounded after the look-up, the head rounds its inputs."""

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        reverse = bool(args[0]) if args else bool(kwargs.get("reverse", False))
        found = quantizers.quantizers_of(self)  # type: ignore[arg-type]
        if reverse:
            # The head of an untied embedding is another variable, the last.
            return self._call_rounded(found[-1], self._round_rows(inputs), *args, **kwargs)
        plain = self.compute_dtype == "float32" and found[0].given is None  # type: ignore[attr-defined]
        if plain and not getattr(self, "lora_enabled", False):
            # A row's scale depends on that row alone, so rounding only the rows in use is exact.
            rows = super(QuantizeAwareMixin, self).call(inputs, *args, **kwargs)  # type: ignore[misc]
            return _keep_mask(rows, _round_looked_up(found[0], rows, inputs))
        return self._call_rounded(found[0], inputs, *args, **kwargs)


def _round_looked_up(quantizer: Quantizer, rows: tf.Tensor, ids: Any) -> tf.Tensor:
    """Rounds rows of a table as the table itself is rounded."""
    grid = replace(quantizer.grid, axes=(-1,))
    scale_of: Any = None
    if quantizer.kept is not None:
        kept = quantizer.grid.representable(tf.convert_to_tensor(quantizer.kept.value))
        looked_up = tf.gather(kept, tf.cast(ids, tf.int32))
        scale_of = lambda _: looked_up  # noqa: E731
    elif quantizer.method != "absmax":
        scale_of = lambda values: rounding.mse_scale(values, grid)  # noqa: E731
    return rounding.fake_quantize(rows, grid, scale_of, quantizer.method == "learned")


def _keep_mask(source: Any, result: Any) -> Any:
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        result._keras_mask = mask
    return result


_classes: dict[type, type] = {}


def _dressed_class(layer_class: type) -> Any:
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


def rounded_target(layer: Any) -> Target:
    """Returns the target of a layer with a quantization spec, with the role it was rounded in."""
    target = target_of(layer)
    return replace(target, role="head") if layer.quantized_as_head else target


def _resolve(layer: Any) -> None:
    """Finds the axes of a dressed layer that was built."""
    target = rounded_target(layer)
    layer._row_axes = target.row_axes
    quantizers.attach(target, layer.quantization_spec)


def QuantizeAware(layer: keras.Layer, spec: Spec) -> keras.Layer:
    """Makes one layer quantize-aware, for models that are built by hand.

    It saves to `.keras` and comes back as it was. `tfgptopt.quantize_aware` does the same for all
    layers of a model.

    Args:
        layer: Dense, EinsumDense, Embedding or ReversibleEmbedding, built or not.
        spec: `Int8()` or `Int4()`.

    Returns:
        The layer itself if it is built, or else a new one with its configuration: of the class of
        `layer`, with all of its methods.

    Raises:
        ValueError: If the layer is of another kind, quantize-aware already, or does not fit.

    Example:

    ```python
    model = keras.Sequential([
        QuantizeAware(keras.layers.Dense(64, activation="relu"), Int8()),
        keras.layers.Dense(10),
    ])
    ```
    """
    from tfgptopt.quantization.aware import check_fits, check_spec

    check_spec(spec)
    known = keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding
    if not isinstance(layer, known):
        raise ValueError(
            "`QuantizeAware` takes Dense, EinsumDense, Embedding or ReversibleEmbedding; for a "
            f"model or a layer of layers, call `tfgptopt.quantize_aware`. Received: {layer!r}"
        )
    if is_dressed(layer):
        raise ValueError(f"{layer.name} is quantize-aware already. Received: {layer!r}")
    if layer.built:
        check_fits([target_of(layer)], spec)
        dress(target_of(layer), spec)
        return layer
    config = {**layer.get_config(), _SPEC: serialize_spec(spec), _IS_HEAD: False}
    return _dressed_class(type(layer)).from_config(config)


def is_dressed(layer: keras.Layer) -> bool:
    """Returns whether a layer computes with rounded weights."""
    return isinstance(layer, QuantizeAwareMixin)


def dress(target: Target, spec: Spec) -> None:
    """Makes the layer of a target quantize-aware, in place."""
    layer = target.layer
    layer.quantization_spec = spec
    layer.quantized_as_head = target.role == "head"
    layer.__class__ = _dressed_class(type(layer))
    _resolve(layer)


def undress(layer: Any) -> None:
    """Writes the rounded weights into a dressed layer and gives it back its own class.

    LoRA adapters are merged. The spec stays on the layer, for exporters.
    """
    for quantizer in quantizers.quantizers_of(layer):
        quantizer.variable.assign(layer.rounded(quantizer))
    quantizers.detach(layer)
    layer.__class__ = _plain_class(type(layer))
    if getattr(layer, "lora_enabled", False):
        _drop_adapters(layer)


def forget(layer: Any) -> None:
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
                stack.enter_context(_without_adapters(layer))
                layer.__class__ = _plain_class(type(layer))
            yield
        finally:
            for layer, own in zip(dressed, classes, strict=True):
                layer.__class__ = own
            for quantizer, value in zip(found, values, strict=True):
                quantizer.variable.assign(value)


def _drop_adapters(layer: Any) -> None:
    """Takes merged LoRA adapters off a layer."""
    kind = "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"
    layer._tracker.unlock()
    for part in ("a", "b"):
        layer._untrack_variable(getattr(layer, f"lora_{kind}_{part}"))
        delattr(layer, f"lora_{kind}_{part}")
    getattr(layer, f"_{kind}").trainable = True
    layer._tracker.lock()
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None


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
