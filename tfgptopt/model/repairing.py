"""Mends KerasHub 0.32 where a model goes around its own layers, so that techniques reach it there.

A technique acts on what a layer computes when it is called. Gemma 4's blocks multiply with the
kernels of their feed-forward layers instead, and Gemma 3n with its token table, in `fit` even with
the one it had when the model object was made. The methods below compute the same through the
layers, and with the table as it is. They are put into the classes of that version of KerasHub, and
of no other, when this is imported: an object of a class of our own would be saved as such.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

_VERSION = "0.32."
_LARGEST_HALF = 65504


def _added(one: Any, other: Any) -> Any:
    """Returns a sum; in float16 without overflow, as Gemma 4 adds."""
    if keras.backend.standardize_dtype(one.dtype) != "float16":
        return one + other
    total = ops.cast(one, "float32") + ops.cast(other, "float32")
    return ops.cast(ops.clip(total, -_LARGEST_HALF, _LARGEST_HALF), "float16")


def _gemma4_feedforward(block: Any, x: Any) -> Any:
    """Returns what the feed-forward networks of a Gemma 4 block add."""
    normed = block.pre_ffw_norm(x)
    gate = keras.activations.gelu(block.gating_ffw(normed), approximate=True)
    found = block.ffw_linear(gate * block.gating_ffw_2(normed))
    if block.enable_moe_block:
        inputs = block.pre_ffw_norm_moe(x)
        rows = ops.reshape(inputs, (-1, ops.shape(inputs)[-1]))
        mixed = block.moe_expert_bank(rows, block.moe_router(x))
        mixed = block.post_ffw_norm_moe_path(ops.reshape(mixed, ops.shape(inputs)))
        found = block.post_ffw_norm_dense(found) + mixed
    return block.post_ffw_norm(found)


def _gemma4_call(
    self: Any,
    x: Any,
    padding_mask: Any = None,
    vision_mask: Any = None,
    cache: Any = None,
    cache_update_index: Any = 0,
    cache_update_mask: Any = None,
    per_layer_input: Any = None,
    shared_kv: Any = None,
    positions: Any = None,
) -> Any:
    if keras.backend.standardize_dtype(x.dtype) == "float16":
        x = ops.clip(x, -_LARGEST_HALF, _LARGEST_HALF)
    normed = self.pre_attention_norm(x)
    mask = self._compute_attention_mask(
        normed, padding_mask, vision_mask, cache, cache_update_index
    )
    cached: dict[str, Any] = {}
    if cache is not None:
        cached = {
            "cache": cache,
            "cache_update_index": cache_update_index,
            "cache_update_mask": cache_update_mask,
        }
    attended, new_cache = self.attention(
        normed, attention_mask=mask, shared_kv=shared_kv, positions=positions, **cached
    )
    attended = self.post_attention_norm(attended)
    x = _added(x, self.attention_dropout(attended) if self.dropout else attended)
    added = _gemma4_feedforward(self, x)
    x = _added(x, self.feedforward_dropout(added) if self.dropout else added)
    if self.hidden_size_per_layer_input > 0 and per_layer_input is not None:
        gate = keras.activations.gelu(self.per_layer_input_gate(x), approximate=True)
        added = self.per_layer_up_proj(gate * ops.cast(per_layer_input, gate.dtype))
        x = x + self.post_per_layer_input_norm(added)
    if self.is_text_layer:
        x = x * ops.cast(self.layer_scalar, x.dtype)
    return x, new_cache


def _counted(token_ids: Any) -> Any:
    """Returns the places of tokens in their rows, an array for an array."""
    if not (ops.is_tensor(token_ids) or isinstance(token_ids, keras.KerasTensor)):
        return np.indices(np.shape(token_ids), np.int32)[-1]
    return ops.cumsum(ops.ones_like(token_ids, dtype="int32"), axis=-1) - 1


def _with_positions(call: Any) -> Any:
    """Returns a `__call__` that knows where tokens stand if nobody says it."""

    @functools.wraps(call)
    def called(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, dict) and "token_ids" in inputs and "position_ids" not in inputs:
            inputs = {**inputs, "position_ids": _counted(inputs["token_ids"])}
        return call(self, inputs, *args, **kwargs)

    return called


def _gemma3n_embedding(self: Any, inputs: Any, reverse: bool = False) -> Any:
    if not reverse:
        return self.embed_tokens(inputs)
    table = self.embed_tokens.embedding
    if hasattr(table, "as_head"):
        logits = table.as_head(inputs)
    else:
        # In its own precision, as KerasHub multiplies: logits are float32 in mixed precision.
        held = ops.convert_to_tensor(table.embeddings._value)
        logits = ops.matmul(ops.cast(inputs, held.dtype), ops.transpose(held))
    if self.final_logit_soft_cap is None:
        return logits
    return ops.tanh(logits / self.final_logit_soft_cap) * self.final_logit_soft_cap


def _gemma3n_call(self: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
    hidden = self.backbone(inputs, training=training)
    return self.backbone.language_model.token_embedding(hidden, reverse=True)


def never_called(layer: keras.Layer) -> tuple[keras.Layer, ...]:
    """Returns the layers inside a layer that it has and does not use."""
    if getattr(layer, "is_kv_shared_layer", False) and hasattr(layer, "k_proj"):
        return layer.k_proj, layer.v_proj
    return ()


def _mend(owner: type, name: str, method: Any) -> None:
    # Keras asks a call what it takes; what is replaced may say only that it takes anything.
    signature = inspect.signature(method)
    made: Any = functools.wraps(getattr(owner, name))(method)
    made.__signature__ = signature
    setattr(owner, name, made)


def _mend_all() -> None:
    from keras_hub.src.models.gemma3n.gemma3n_text_model import Gemma3nTextModel
    from keras_hub.src.models.gemma4.gemma4_decoder_block import Gemma4TextDecoderBlock

    _mend(Gemma4TextDecoderBlock, "call", _gemma4_call)
    _mend(Gemma3nTextModel, "token_embedding", _gemma3n_embedding)
    _mend(keras_hub.models.Gemma3nCausalLM, "call", _gemma3n_call)
    for model in (keras_hub.models.Gemma4Backbone, keras_hub.models.Gemma4CausalLM):
        _mend(model, "__call__", _with_positions(model.__call__))


if keras_hub.__version__.startswith(_VERSION):
    _mend_all()
