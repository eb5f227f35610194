"""What is seen of a model in one forward pass: logits, hidden states, attention maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.model.overriding import Override, overriding
from tfgptopt.model.types import Data


@dataclass(eq=False)
class View:
    """What one forward pass of a model gave.

    Attributes:
        logits: `(batch, tokens, vocabulary)`.
        hidden: Layer ids to the output of the layer, `(batch, tokens, width)`.
        attention: Layer ids to attention maps, `(batch, heads, tokens, tokens)`, rows sum to 1.
    """

    logits: Any = None
    hidden: dict[int, tf.Tensor] = field(default_factory=dict)
    attention: dict[int, tf.Tensor] = field(default_factory=dict)

    def map(self, function: Any) -> View:
        """Returns a view with a function applied to each tensor."""
        return View(
            function(self.logits),
            {key: function(value) for key, value in self.hidden.items()},
            {key: function(value) for key, value in self.attention.items()},
        )


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the teacher says of a batch.

    Attributes:
        view: What a model that runs beside the student gave, or `None`.
        top_k: `(indices, log_probabilities)` that were recorded, `(batch, tokens, k)`, or `None`.
        pairs: Ids of losses to their pairs of layer ids, `(student, teacher)`, each with the
            variable that projects the student's width to the teacher's, or `None`.
    """

    view: Any = None
    top_k: Any = None
    pairs: Mapping[int, Mapping[tuple[int, int], Any]] = field(default_factory=dict)


def attention_inside(block: keras.Layer) -> keras.Layer:
    """Returns the layer inside a block that computes attention weights.

    Raises:
        ValueError: If there is none, or several.
    """
    inside = list(block._flatten_layers())
    found = [x for x in inside if isinstance(x, keras.layers.MultiHeadAttention)]
    found = found or [x for x in inside if isinstance(x, keras.layers.Softmax)]
    if len(found) != 1:
        raise ValueError(
            f"{block.path or block.name} has {len(found)} layers that compute attention weights "
            "(MultiHeadAttention or Softmax): AttentionMaps() needs blocks with exactly one."
        )
    return found[0]


def _watched(layer: keras.Layer, view: View) -> Override:
    call = layer.call

    def watched(*args: object, **kwargs: object) -> Any:
        result = call(*args, **kwargs)
        view.hidden[id(layer)] = result[0] if isinstance(result, tuple) else result
        return result

    return layer, "call", watched


def _watched_attention(layer: keras.Layer, view: View) -> Override:
    if isinstance(layer, keras.layers.MultiHeadAttention):
        compute = layer._compute_attention

        def computed(*args: object, **kwargs: object) -> Any:
            # Else Keras takes a fused kernel, which has no map to show.
            result = compute(*args, **{**kwargs, "return_attention_scores": True})
            view.attention[id(layer)] = result[1]
            return result

        return layer, "_compute_attention", computed
    call = layer.call

    def watched(*args: object, **kwargs: object) -> Any:
        result = call(*args, **kwargs)
        # Gemma has an axis of groups and one of heads in each.
        heads, shape = math.prod(result.shape[1:-2]), tf.shape(result)
        view.attention[id(layer)] = tf.reshape(result, (shape[0], heads, shape[-2], shape[-1]))
        return result

    return layer, "call", watched


def look(
    model: keras.Model,
    inputs: Data,
    hidden: Sequence[keras.Layer] = (),
    attention: Sequence[keras.Layer] = (),
    training: bool = False,
) -> View:
    """Runs a model, and returns its logits and what was asked for of its layers.

    Args:
        model: A Keras model from inputs to logits.
        inputs: What it reads.
        hidden: Layers whose outputs are wanted.
        attention: Layers of `attention_inside` whose maps are wanted.
        training: bool. Whether dropout is on. Defaults to `False`.

    Returns:
        `View`.

    Raises:
        ValueError: If a layer is not called, or shows no map.
    """
    view = View()
    replacements = [_watched(layer, view) for layer in hidden]
    replacements += [_watched_attention(layer, view) for layer in attention]
    with overriding(replacements):
        view.logits = model(inputs, training=training)
    for layer in hidden:
        if id(layer) not in view.hidden:
            raise ValueError(f"'{model.name}' does not call {layer.path or layer.name}.")
    for layer in attention:
        if view.attention.get(id(layer)) is None:
            raise ValueError(
                f"{layer.path or layer.name} shows no attention map: it computes attention in one "
                "fused operation on this device. Leave out AttentionMaps()."
            )
    return view
