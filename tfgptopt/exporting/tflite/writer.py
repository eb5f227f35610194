"""Writes a `.tflite` file: signatures, weights, and what a runtime must know of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import tfgptopt
from tfgptopt.decoder import DecoderSpec, read_decoder
from tfgptopt.exporting.tflite.builder import Model
from tfgptopt.exporting.tflite.decoder_graph import Step, add_signatures
from tfgptopt.exporting.tokenizer import tokenizer_json
from tfgptopt.exporting.writing import replacing
from tfgptopt.generation.container import FORMAT_VERSION, METADATA_NAME, seal
from tfgptopt.recipe import recipe_of

_SMALLEST_WINDOW = 128
# Of models that have any number of positions: KerasHub's own default length of a text.
_DEFAULT_CONTEXT = 1024
# Lengths of prefill: the best for a long prompt, and one for what is left of it.
_CHUNK, _SHORT_CHUNK = 128, 32


def _windows(context_length: int, growth: float) -> list[int]:
    """Returns windows up to the whole context, in steps of 128 that grow with the window."""
    windows = [min(_SMALLEST_WINDOW, context_length)]
    while windows[-1] < context_length:
        steps = max(1, int(windows[-1] * (growth - 1)) // _SMALLEST_WINDOW)
        windows.append(min(windows[-1] + steps * _SMALLEST_WINDOW, context_length))
    return windows


def plan_signatures(context_length: int) -> dict[str, list[Step]]:
    """Returns the signatures of a file, by what they are for.

    `decode` reads one token; `prefill` reads many without logits; `score` gives all logits. Each
    attends to a window of the cache, so that a short text does not pay for the whole context. The
    windows are few, since each signature takes some 5 ms to load, and memory.
    """
    chunk = min(context_length, _CHUNK)
    doubled, few = _windows(context_length, 2), _windows(context_length, 4)
    prefill = [(chunk, window) for window in doubled]
    if chunk > _SHORT_CHUNK:
        prefill += [(_SHORT_CHUNK, window) for window in few]
    return {
        "decode": [Step(f"decode_{w}", 1, w, True) for w in _windows(context_length, 1.5)],
        "prefill": [Step(f"prefill_{n}_{w}", n, w, False) for n, w in prefill],
        "score": [Step(f"score_{chunk}_{w}", chunk, w, True) for w in few],
    }


def _with_context(spec: DecoderSpec, model: Any, context_length: int | None) -> DecoderSpec:
    """Returns the decoder with as many positions as are asked for, or as fit the model."""
    largest = spec.context_length
    if context_length is None:
        if largest is not None:
            return spec
        preprocessor = getattr(model, "preprocessor", None)
        context_length = getattr(preprocessor, "sequence_length", None) or _DEFAULT_CONTEXT
    if not isinstance(context_length, int) or not 2 <= context_length <= (largest or 2**24):
        limits = f"from 2 to {largest}, the positions that the model has" if largest else ">= 2"
        raise ValueError(f"`context_length` must be an int {limits}. Received: {context_length!r}")
    return spec.with_context(context_length)


def _generation_defaults(preprocessor: Any) -> dict[str, int | None]:
    tokenizer = getattr(preprocessor, "tokenizer", None)
    starts = getattr(preprocessor, "add_start_token", False)
    return {
        "start_token_id": getattr(tokenizer, "start_token_id", None) if starts else None,
        "end_token_id": getattr(tokenizer, "end_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }


def _arrays(spec: DecoderSpec) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the weights of a decoder, integers where there are any, and the scales of those."""
    arrays, scales = [], []
    if spec.position_embedding is not None:
        arrays.append(spec.position_embedding)
    for norm in spec.norms():
        arrays += [norm.gamma] if norm.beta is None else [norm.gamma, norm.beta]
    for matrix in spec.matrices():
        arrays += [matrix.values] if matrix.bias is None else [matrix.values, matrix.bias]
        scales += [] if matrix.scale is None else [matrix.scale]
    return arrays, scales


def _describe_weights(spec: DecoderSpec) -> dict[str, Any]:
    """Returns how many weights there are, how many are not zero, and a hash of their bytes."""
    arrays, scales = _arrays(spec)
    digest = hashlib.sha256()
    for array in (*arrays, *scales):
        digest.update(np.ascontiguousarray(array).data)
    return {
        "parameters": sum(array.size for array in arrays),
        "nonzero": sum(int(np.count_nonzero(array)) for array in arrays),
        "sha256": digest.hexdigest(),
    }


def _metadata(model: Any, spec: DecoderSpec, steps: dict[str, list[Step]]) -> dict[str, Any]:
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    sizes = {
        kind: {step.name: [step.length, step.window] for step in steps[kind]} for kind in steps
    }
    recipe = recipe_of(model)
    return {
        "format_version": FORMAT_VERSION,
        "versions": {
            "tfgptopt": tfgptopt.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "keras_hub": keras_hub.__version__,
        },
        "source": {"class": type(model).__name__, "family": spec.family, "config": spec.config},
        "decoder": {
            "num_layers": len(spec.blocks),
            "num_heads": spec.blocks[0].attention.num_heads,
            "num_key_value_heads": spec.cache_shape[0],
            "head_dim": spec.cache_shape[2],
            "context_length": spec.context_length,
            "vocabulary_size": spec.vocabulary_size,
        },
        "signatures": sizes,
        "generation": _generation_defaults(preprocessor),
        "recipe": recipe.to_config() if recipe else None,
        "weights": _describe_weights(spec),
        "tokenizer": None if tokenizer is None else tokenizer_json(tokenizer),
    }


def write_tflite(model: keras.Model, target: Path, context_length: int | None) -> None:
    """Writes a causal LM as a `.tflite` file.

    Args:
        model: A `keras_hub.models.GPT2CausalLM`, dressed or plain.
        target: The file.
        context_length: Positions of the KV cache, in tokens, or `None` for all.

    Raises:
        ValueError: If the family has no reader, or `context_length` is out of range.
    """
    spec = _with_context(read_decoder(model), model, context_length)
    steps = plan_signatures(spec.cache_shape[1])
    file = Model(f"{spec.family} by tfgptopt {tfgptopt.__version__}")
    add_signatures(file, spec, (step for kind in steps.values() for step in kind))
    metadata = _metadata(model, spec, steps)
    file.metadata(METADATA_NAME, json.dumps(metadata, ensure_ascii=False).encode())
    with replacing(target) as temporary:
        data = file.tobytes()
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.write(seal(data))
