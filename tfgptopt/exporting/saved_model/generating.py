"""The signatures of a causal LM's SavedModel: prefill, KV cache and the loop in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras_hub
import tensorflow as tf

from tfgptopt.exporting.saved_model.text import TextTokenizer
from tfgptopt.exporting.signatures import Endpoint
from tfgptopt.exporting.tokenizers import end_token_ids

_Tensors = dict[str, tf.Tensor]
# Texts, layers, keys and values, positions, heads, head_dim.
_CACHE_RANK = 6


class _Drawing(keras_hub.samplers.Sampler):  # type: ignore[misc]
    """Draws tokens from a seed and their position, so that a graph has no state."""

    def __init__(
        self, seed: tf.Tensor, temperature: tf.Tensor, top_k: tf.Tensor, top_p: tf.Tensor
    ) -> None:
        super().__init__()
        self._seed, self._scale, self._top_k, self._top_p = seed, temperature, top_k, top_p

    def __call__(self, next: Callable[..., Any], **rest: Any) -> tf.Tensor:
        def positioned(prompt: tf.Tensor, cache: Any, index: tf.Tensor) -> Any:
            self._index = tf.cast(index, tf.int32)
            return next(prompt, cache, index)

        return super().__call__(next=positioned, **rest)

    def compute_probabilities(self, logits: tf.Tensor) -> tf.Tensor:
        """Returns logits: what is drawn from needs no softmax."""
        return tf.cast(logits, tf.float32) / self._scale

    def get_next_token(self, logits: tf.Tensor) -> tf.Tensor:
        """Returns a token for each row."""
        asked = tf.logical_or(self._top_k > 0, self._top_p < 1.0)
        left = tf.cond(asked, lambda: self._restricted(logits), lambda: logits)
        seed = tf.stack([self._seed, self._index])
        return tf.random.stateless_categorical(left, 1, seed)[:, 0]

    def _restricted(self, logits: tf.Tensor) -> tf.Tensor:
        """Sets logits of tokens that are out to minus infinity."""
        size = tf.shape(logits)[-1]
        ordered = tf.sort(logits, direction="DESCENDING")
        count = tf.where(self._top_k > 0, tf.minimum(self._top_k, size), size)
        ordered = tf.where(tf.range(size) < count, ordered, -float("inf"))
        shares = tf.nn.softmax(ordered)
        before = tf.cumsum(shares, axis=-1, exclusive=True)
        # The fewest tokens that have `top_p` together, one at least.
        kept = tf.reduce_sum(tf.cast(before < self._top_p, tf.int32), axis=-1)
        kept = tf.clip_by_value(kept, 1, count)
        least = tf.gather(ordered, kept - 1, axis=-1, batch_dims=1)[:, None]
        return tf.where(logits >= least, logits, -float("inf"))


def _with_sampler(
    model: keras_hub.models.CausalLM, sampler: keras_hub.samplers.Sampler, inputs: _Tensors
) -> _Tensors:
    """Returns padded texts, and where they are text, continued by a sampler."""
    stop = tuple(end_token_ids(getattr(model.preprocessor, "tokenizer", None))) or None
    previous = getattr(model, "sampler", None)
    model.sampler = sampler
    try:
        mask = tf.cast(inputs["padding_mask"], tf.bool)
        outputs = model.generate_step({**inputs, "padding_mask": mask}, stop_token_ids=stop)
    finally:
        model.sampler = previous
    return {name: tf.cast(outputs[name], tf.int32) for name in ("token_ids", "padding_mask")}


def generating_endpoints(
    model: keras_hub.models.CausalLM, tokenizer: TextTokenizer | None
) -> Iterator[Endpoint]:
    """Yields the signatures with which a causal LM generates.

    Args:
        model: The model.
        tokenizer: Encodes texts in a graph, or `None`.
    """
    texts = [tf.TensorSpec((None, None), tf.int32, n) for n in ("token_ids", "padding_mask")]

    def generate(token_ids: tf.Tensor, padding_mask: tf.Tensor) -> _Tensors:
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        return _with_sampler(model, keras_hub.samplers.GreedySampler(), inputs)

    def sample(
        token_ids: tf.Tensor,
        padding_mask: tf.Tensor,
        seed: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
    ) -> _Tensors:
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        return _with_sampler(model, _Drawing(seed, temperature, top_k, top_p), inputs)

    settings = {"seed": tf.int32, "temperature": tf.float32, "top_k": tf.int32, "top_p": tf.float32}
    scalars = [tf.TensorSpec((), dtype, name) for name, dtype in settings.items()]
    yield Endpoint("generate", generate, texts)
    yield Endpoint("sample", sample, [*texts, *scalars])
    yield from _cached_endpoints(model)
    if tokenizer is not None:

        def generate_text(prompts: tf.Tensor, max_length: tf.Tensor) -> _Tensors:
            token_ids, padding_mask = tokenizer.encode(prompts, max_length)
            made = generate(token_ids, padding_mask)
            return {"texts": tokenizer.decode(made["token_ids"], made["padding_mask"])}

        prompts = tf.TensorSpec((None,), tf.string, "prompts")
        length = tf.TensorSpec((), tf.int32, "max_length")
        yield Endpoint("generate_text", generate_text, [prompts, length])


def _cached_endpoints(model: keras_hub.models.CausalLM) -> Iterator[Endpoint]:
    """Yields prefill and decode, for caches that are one tensor as most of KerasHub's are."""
    held = model._build_cache(tf.zeros((1, 2), tf.int32))[-1]
    if not isinstance(held, tf.Tensor) or held.shape.rank != _CACHE_RANK:
        return

    def prefill(token_ids: tf.Tensor) -> _Tensors:
        return {"cache": model._build_cache(token_ids)[-1]}

    def decode(token_ids: tf.Tensor, cache: tf.Tensor, cache_update_index: tf.Tensor) -> _Tensors:
        logits, _, cache = model.call_with_cache(token_ids[:, None], cache, cache_update_index)
        return {"logits": tf.cast(logits[:, 0], tf.float32), "cache": cache}

    _, layers, pair, _, heads, size = held.shape
    shape = (None, layers, pair, None, heads, size)
    yield Endpoint("prefill", prefill, [tf.TensorSpec((None, None), tf.int32, "token_ids")])
    decoding = [
        tf.TensorSpec((None,), tf.int32, "token_ids"),
        tf.TensorSpec(shape, held.dtype, "cache"),
        tf.TensorSpec((), tf.int32, "cache_update_index"),
    ]
    yield Endpoint("decode", decode, decoding)
