"""Exports through TensorFlow's converter, for models that no reader describes.

A causal language model gets the same signatures as one that the graph writer knows, made from its
own `call_with_cache`. Any other model gets what `keras.Model.export` gives.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder.reading import read_head, read_matrix
from tfgptopt.decoder.spec import Matrix
from tfgptopt.exporting.signatures import Endpoint, input_signature, save_endpoints
from tfgptopt.exporting.tflite.decoder_graph import Step
from tfgptopt.file import names
from tfgptopt.model.current import full_precision
from tfgptopt.model.precision import in_float32
from tfgptopt.model.retracing import retrace
from tfgptopt.model.targets import Target, candidates
from tfgptopt.quantization import layers
from tfgptopt.quantization.quantizers import quantizers_of

_Named = dict[str, tf.Tensor]


class _Fenced:
    """Lets a product be, whatever stands around it.

    The converter multiplies factors before and behind a product into its weights, which then are
    no integers times scales any more. It does not look through a minimum that changes nothing.
    """

    def call(self, inputs: tf.Tensor, *args: object, **kwargs: object) -> tf.Tensor:
        outputs = super().call(_fence(inputs), *args, **kwargs)  # type: ignore[misc]
        return _fence(outputs)


def _fence(x: tf.Tensor) -> tf.Tensor:
    return tf.minimum(x, tf.cast(x.dtype.max, x.dtype)) if x.dtype.is_floating else x


@contextlib.contextmanager
def ready_to_convert(model: keras.Layer) -> Iterator[None]:
    """Makes quantized layers plain ones with rounded weights for a while, fenced in, in float32."""
    quantized = [x for x in model._flatten_layers() if layers.spec_of(x) is not None]
    dressed = [x for x in quantized if layers.is_dressed(x)]
    with in_float32(model), layers.finalized_for_a_while(dressed):
        _settle([layer for layer in quantized if layer not in dressed])
        classes = [type(layer) for layer in quantized]
        try:
            for layer in quantized:
                # A tied table is looked up, too, which leaves it as it is.
                if not getattr(layer, "tie_weights", isinstance(layer, keras.layers.Embedding)):
                    layer.__class__ = type(type(layer).__name__, (_Fenced, type(layer)), {})
            retrace(model)
            yield
        finally:
            for layer, own in zip(quantized, classes, strict=True):
                layer.__class__ = own
    retrace(model)


def _settle(finalized: list[keras.Layer]) -> None:
    """Puts weights that were stored in 16 bits exactly on their grid, in variables of float32."""
    for layer in finalized:
        for quantizer in quantizers_of(layer):
            quantizer.variable.assign(quantizer.rounded(full_precision(quantizer.variable)))


def quantized_matrices(model: keras.Layer) -> list[Matrix]:
    """Returns the weights of a model that lie on a grid."""
    found = [item for item in candidates(model) if isinstance(item, Target)]
    quantized = [target.layer for target in found if layers.spec_of(target.layer) is not None]
    heads = [read_head(layer) for layer in quantized if hasattr(layer, "reverse_embeddings")]
    matrices = [read_matrix(layer, activated=True) for layer in quantized]
    return matrices + [head for head in heads if head is not None]


def cache_shape(
    model: keras_hub.models.CausalLM, context_length: int
) -> tuple[int, tuple[int, int, int]]:
    """Returns the number of layers of a causal LM, and the shape of the keys of each.

    Raises:
        ValueError: If the model holds its cache in another form than most of KerasHub do.
    """
    try:
        tokens = tf.zeros((1, context_length), tf.int32)
        cache = model._build_cache(tokens)[-1]
        batch, count, pair, positions, heads, size = cache.shape
        if (batch, pair, positions) != (1, 2, context_length):
            raise ValueError(f"its shape is {cache.shape}")
    except (AttributeError, TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"Cannot export {type(model).__name__} with a KV cache: expected `_build_cache(tokens)`"
            " to give a cache of shape (batch, layers, 2, positions, heads, head_dim), as in "
            f"KerasHub ({error}). Export a SavedModel instead: give a folder as path."
        ) from error
    return count, (heads, positions, size)


def convert_causal_lm(
    model: keras_hub.models.CausalLM,
    steps: Iterable[Step],
    count: int,
    shape: tuple[int, int, int],
) -> schema.ModelT:
    """Converts `call_with_cache` of a causal LM, one signature for each step.

    Args:
        model: A causal LM of KerasHub, plain.
        steps: The signatures.
        count: Number of layers.
        shape: Shape of the keys of a layer, `(heads, context, head_dim)`.

    Returns:
        The file, with float weights.

    Raises:
        ValueError: If the converter cannot convert it.
    """
    kinds = (names.KEYS, names.VALUES)
    caches = [names.in_layer(kind, i) for i in range(count) for kind in kinds]
    endpoints = []
    for step in steps:
        spec = {
            **{
                name: tf.TensorSpec((step.length,), tf.int32, name=name)
                for name in (names.TOKENS, names.POSITIONS)
            },
            **{name: tf.TensorSpec(shape, tf.float32, name=name) for name in caches},
        }
        endpoints.append(Endpoint(step.name, _step_function(model, step, caches), [spec]))
    with tempfile.TemporaryDirectory() as folder:
        save_endpoints(endpoints, folder, weights=[v.value for v in model.variables])
        keys = [endpoint.name for endpoint in endpoints]
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=keys)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            content = converter.convert()
        except Exception as error:
            raise ValueError(
                f"TensorFlow's converter cannot convert {type(model).__name__}: {error}. Export a "
                "SavedModel instead: give a folder as path."
            ) from error
    return schema.ModelT.InitFromPackedBuf(content, 0)


def _step_function(
    model: keras_hub.models.CausalLM, step: Step, caches: list[str]
) -> Callable[[_Named], _Named]:
    """Returns a signature as a function of tokens, positions and caches by head."""

    def run(inputs: _Named) -> _Named:
        held = [tf.transpose(inputs[name], (1, 0, 2)) for name in caches]
        seen = tf.stack(held)
        seen = tf.reshape(seen, (1, len(caches) // 2, 2, *seen.shape[1:]))
        logits, _, new = model.call_with_cache(
            inputs[names.TOKENS][None],
            tf.cast(seen, model.compute_dtype),
            inputs[names.POSITIONS][0],
        )
        outputs = {}
        for i, name in enumerate(caches):
            updated = tf.cast(new[0, i // 2, i % 2], tf.float32)
            outputs[name] = tf.transpose(updated, (1, 0, 2))
        if step.logits:
            outputs[names.LOGITS] = tf.cast(logits, tf.float32)
        return outputs

    return run


def convert_any(model: keras.Model) -> schema.ModelT:
    """Converts a model of any kind by Keras' own LiteRT export, its weights as floats.

    Raises:
        ValueError: If it has no declared inputs, or the converter cannot convert it.
    """
    input_signature(model)  # Raises.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        try:
            model.export(str(path), format="litert", verbose=False)
        except Exception as error:
            raise ValueError(
                f"Keras' LiteRT export cannot convert '{model.name}': {error}. Export a SavedModel "
                "instead: give a folder as path."
            ) from error
        return schema.ModelT.InitFromPackedBuf(np.frombuffer(path.read_bytes(), np.uint8), 0)
