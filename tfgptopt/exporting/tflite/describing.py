"""Describes a model in the metadata of its file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import tfgptopt
from tfgptopt.data.chats import template_of
from tfgptopt.data.portable import Portable
from tfgptopt.exporting.tflite.decoder_graph import Step
from tfgptopt.exporting.tokenizers import end_token_ids, store_tokenizer
from tfgptopt.file.metadata import (
    CACHE_DTYPES,
    CacheDtype,
    DecoderShape,
    GenerationDefaults,
    Metadata,
    Signature,
    Signatures,
    Source,
    Weights,
)
from tfgptopt.generation.templates import TURN_TOKENS
from tfgptopt.model.techniques import techniques_of

# Of models that have any number of positions: KerasHub's own default length of a text.
_DEFAULT_CONTEXT = 1024
# The best for a long prompt, and before it one for what is left of that.
PREFILL_LENGTHS = (32, 128)
# For guesses of the next tokens, which are read at once.
VERIFY_LENGTHS = (4, 8)
# Of texts that are decoded together, each of which adds operators to the file.
_LARGEST_BATCH = 64


class Settings(Protocol):
    """What a user can choose of a causal LM's file; `TFLite` explains it."""

    @property
    def context_length(self) -> int | None: ...

    @property
    def cache_dtype(self) -> CacheDtype: ...

    @property
    def sparse(self) -> bool: ...


def check_settings(context_length: object, cache_dtype: object) -> None:
    """Raises where settings that formats share are out of range.

    Raises:
        ValueError: If they are.
    """
    length = context_length
    if length is not None and (
        not isinstance(length, int) or isinstance(length, bool) or length < 2
    ):
        raise ValueError(f"`context_length` must be an int >= 2, or None. Received: {length!r}")
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"`cache_dtype` must be one of {CACHE_DTYPES}. Received: {cache_dtype!r}")


def check_batch_sizes(batch_sizes: object) -> None:
    """Raises where numbers of texts that are decoded together are out of range.

    Raises:
        ValueError: If they are.
    """
    sizes = batch_sizes
    if not isinstance(sizes, tuple) or not all(
        isinstance(size, int) and not isinstance(size, bool) and 2 <= size <= _LARGEST_BATCH
        for size in sizes
    ):
        raise ValueError(
            f"`batch_sizes` must be a tuple of ints from 2 to {_LARGEST_BATCH}, such as (4, 8). "
            f"Received: {sizes!r}"
        )
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"`batch_sizes` names a size twice. Received: {sizes!r}")


def plan_signatures(
    context_length: int,
    prefill: Sequence[int],
    renamed: bool = False,
    batch_sizes: Sequence[int] = (),
) -> Signatures:
    """Returns the signatures of a file. They are few: each takes time to load, and memory.

    Args:
        context_length: Positions of the cache.
        prefill: Lengths of prefill, the largest last. None is longer than the context.
        renamed: Whether the names have to differ from those of `growing_steps` and
            `masked_steps`. Defaults to `False`.
        batch_sizes: How many texts are decoded together. Defaults to none.
    """
    chunk = min(context_length, prefill[-1])
    lengths = [*(length for length in prefill if length < chunk), chunk]
    one, many = ("next", "read") if renamed else ("decode", "prefill")
    return Signatures(
        decode=Signature(1, one),
        prefill=tuple(Signature(length, f"{many}_{length}") for length in lengths),
        score=tuple(
            Signature(length, f"score_{length}")
            for length in sorted({*(n for n in VERIFY_LENGTHS if n < chunk), chunk})
        ),
        batch=tuple(Signature(size, f"decode_{size}") for size in sorted(batch_sizes)),
    )


def steps_of(signatures: Signatures) -> list[Step]:
    """Returns signatures as the steps that a graph is made of."""
    with_logits = (signatures.decode, *signatures.score)
    found = (signatures.decode, *signatures.prefill, *signatures.score)
    steps = [Step(s.name, s.length, s in with_logits) for s in found]
    return steps + [Step(s.name, s.length, logits=True, apart=True) for s in signatures.batch]


def growing_steps() -> list[Step]:
    """Returns the steps with which LiteRT-LM makes caches grow.

    It reads a prompt at once: the length of prefill stands for any but one.
    """
    return [Step("decode", 1, True, growing=True), Step("prefill", 2, False, growing=True)]


def masked_steps(signatures: Signatures) -> list[Step]:
    """Returns the steps that LiteRT-LM runs where it says itself which tokens see which.

    Args:
        signatures: What the file has besides: prefill is as long there.
    """
    prefill = [Step(f"prefill_{n}", n, False, masked=True) for n, _ in signatures.prefill]
    return [Step("decode", 1, True, masked=True), *prefill]


def context_of(model: keras.Model, largest: int | None, wanted: int | None) -> int:
    """Returns how many positions the cache holds: as many as asked for, or as fit the model.

    Args:
        model: The model.
        largest: Positions that it has, or `None` for any number.
        wanted: What was asked for, or `None`.

    Raises:
        ValueError: If the model has fewer than were asked for.
    """
    if wanted is None:
        preprocessor = getattr(model, "preprocessor", None)
        given = getattr(preprocessor, "sequence_length", None)
        return largest or given or _DEFAULT_CONTEXT
    if wanted > (largest or 2**24):
        limits = f"from 2 to {largest}, the positions that the model has" if largest else ">= 2"
        raise ValueError(f"`context_length` must be an int {limits}. Received: {wanted!r}")
    return wanted


def describe_weights(arrays: Sequence[np.ndarray], scales: Sequence[np.ndarray] = ()) -> Weights:
    """Returns how many weights there are, how many are not zero, and a hash of their bytes.

    Args:
        arrays: The weights, integers where there are any.
        scales: Scales of those. They are hashed, and not counted. Defaults to none.
    """
    digest = hashlib.sha256()
    for array in (*arrays, *scales):
        digest.update(np.ascontiguousarray(array).data)
    return Weights(
        parameters=sum(array.size for array in arrays),
        nonzero=sum(int(np.count_nonzero(array)) for array in arrays),
        sha256=digest.hexdigest(),
    )


def describe(
    model: keras.Model, decoder: DecoderShape, signatures: Signatures, weights: Weights
) -> Metadata:
    """Returns the metadata of a causal LM's file.

    Args:
        model: The model.
        decoder: What a runtime must know of the decoder.
        signatures: What the file has.
        weights: Of the file.

    Raises:
        ValueError: If its tokenizer cannot be stored.
    """
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    backbone = getattr(model, "backbone", model)
    starts = getattr(preprocessor, "add_start_token", False)
    template = template_of(model)
    names = (*TURN_TOKENS, *(template.names if template else ()))
    stored = Portable() if tokenizer is None else store_tokenizer(tokenizer, names)
    techniques = [technique.to_config() for technique in techniques_of(model)]
    return Metadata(
        versions={
            "tfgptopt": tfgptopt.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "keras_hub": keras_hub.__version__,
        },
        source=Source(
            class_name=type(model).__name__,
            family=type(backbone).__name__,
            config=keras.saving.serialize_keras_object(backbone)["config"],
        ),
        decoder=decoder,
        signatures=signatures,
        generation=GenerationDefaults(
            start_token_id=getattr(tokenizer, "start_token_id", None) if starts else None,
            end_token_ids=tuple(end_token_ids(tokenizer)),
            pad_token_id=getattr(tokenizer, "pad_token_id", None),
        ),
        recipe={"techniques": techniques} if techniques else None,
        weights=weights,
        tokenizer=stored.json,
        sentencepiece=stored.sentencepiece,
        special_tokens=stored.special_tokens,
        chat=None if template is None else template.to_metadata(),
    )
