"""Writes a SavedModel that TensorFlow loads and calls without Keras."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.decoder import is_decoder_only
from tfgptopt.exporting.saved_model.generating import generating_endpoints
from tfgptopt.exporting.saved_model.text import text_tokenizer
from tfgptopt.exporting.signatures import Endpoint, input_signature, save_endpoints
from tfgptopt.model.retracing import retrace
from tfgptopt.quantization import layers
from tfgptopt.quantization.integers import Integers, read_integers
from tfgptopt.quantization.quantizers import quantizers_of

# Tensors, or their specs, in the structure that a model takes or gives.
_Tensors = Any


class _StoredWeight(tf.Module):
    """A rounded weight as a variable of integers, int4 two to a byte, and its scales."""

    def __init__(self, stored: Integers) -> None:
        super().__init__()
        self._shape, self._grid = stored.integers.shape, stored.grid
        integers = self._grid.number.pack(stored.integers)
        self.integers = tf.Variable(integers, trainable=False, name="integers")
        self.scale = tf.Variable(stored.scale, trainable=False, name="scale")

    def floats(self) -> tf.Tensor:
        """Returns the rounded weights as float32."""
        integers, number = tf.convert_to_tensor(self.integers), self._grid.number
        if number.per_byte > 1:
            places = tf.stack(number.places(tf.cast(integers, tf.int32)), axis=-1)
            flat = tf.reshape(places, (-1,))[: int(np.prod(self._shape))]
            integers = tf.reshape(flat, self._shape)
        values = tf.cast(tf.ensure_shape(integers, self._shape), tf.float32)
        return self._grid.decode(values, tf.convert_to_tensor(self.scale))


class _Weights:
    """What a SavedModel holds: rounded weights as integers, all other variables as they are."""

    def __init__(self, model: keras.Layer) -> None:
        self._layers = [x for x in model._flatten_layers() if layers.spec_of(x) is not None]
        read = [read_integers(layer) for layer in self._layers]
        self.stored = [[_StoredWeight(one) for one in found] for found in read]
        self._variables_of = [[one.variable for one in found] for found in read]
        replaced = {id(variable) for found in self._variables_of for variable in found}
        self.others = [v.value for v in model.variables if id(v) not in replaced]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Makes the model compute with the stored weights, in a function that is traced."""
        mapping = []
        with ExitStack() as stack:
            for layer, found, variables in zip(
                self._layers, self.stored, self._variables_of, strict=True
            ):
                # Here, before any loop: a loop over tokens does not make floats again.
                values = [one.floats() for one in found]
                if not layers.is_dressed(layer):
                    mapping += list(zip(variables, values, strict=True))
                    continue
                for quantizer, value in zip(quantizers_of(layer), values, strict=True):
                    object.__setattr__(quantizer, "given", value)
                    stack.callback(object.__setattr__, quantizer, "given", None)
            if mapping:
                stack.enter_context(keras.StatelessScope(state_mapping=mapping))
            yield

    def using(self, function: Callable[..., _Tensors]) -> Callable[..., _Tensors]:
        """Returns a function that computes with the stored weights."""

        def run(*args: _Tensors) -> _Tensors:
            with self.in_use():
                return function(*args)

        return run


@dataclass(frozen=True)
class SavedModel:
    """A folder that TensorFlow loads and calls without Keras, rounded weights as integers.

    Of any model it has the signature `serve`, which is `serving_default`. Of a causal LM of
    KerasHub also, with any batch size and length:

    - `generate(token_ids, padding_mask)`: greedy, prefill, KV cache and the loop over tokens in
      one graph. Prompts are padded to the length that the texts are to have.
    - `sample(token_ids, padding_mask, seed, temperature, top_k, top_p)`: the same, with tokens that
      are drawn; `top_k=0` and `top_p=1.0` keep all. A seed gives the same texts again.
    - `prefill(token_ids)` gives the `cache` of padded prompts, and `decode(token_ids, cache,
      cache_update_index)` the `logits` behind one token more of each, and the cache: for loops of
      one's own. The weights are made floats at each call, so that `generate` is faster.
    - `generate_text(prompts, max_length)`: texts in and out, for tokenizers that are SentencePiece
      models. Whoever loads the folder imports tensorflow-text first.

    Signatures compile with XLA: `tf.function(loaded.generate, jit_compile=True)`, but for
    `generate_text` as a whole.

    Example:

    ```python
    tfgptopt.export(gpt, "saved", SavedModel())
    loaded = tf.saved_model.load("saved")
    prompt = np.array([[17, 5, 3, 0, 0, 0, 0, 0]], np.int32)
    mask = np.array([[1, 1, 1, 0, 0, 0, 0, 0]], np.int32)
    print(loaded.generate(prompt, mask)["token_ids"])
    ```
    """

    suffix: ClassVar[str] = ""

    def write(self, model: keras.Model, target: Path) -> None:
        """Writes a built model, dressed or plain.

        Args:
            model: The model.
            target: The folder, which is not there.

        Raises:
            ValueError: If the model has no declared inputs and was never called.
        """
        weights = _Weights(model)
        tracked: dict[str, Any] = {"stored": weights.stored, "others": weights.others}

        def serve(*inputs: _Tensors) -> _Tensors:
            return model(*inputs, training=False)

        if is_decoder_only(model):
            names = ("token_ids", "padding_mask")
            spec = {name: tf.TensorSpec((None, None), tf.int32, name=name) for name in names}
            tracked["tokenizer"] = tokenizer = text_tokenizer(model)
            endpoints = [Endpoint("serve", serve, [spec]), *generating_endpoints(model, tokenizer)]
        else:
            endpoints = [Endpoint("serve", serve, input_signature(model))]
        stored = [replace(one, function=weights.using(one.function)) for one in endpoints]
        save_endpoints(stored, target, **tracked)
        retrace(model)
