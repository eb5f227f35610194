"""Writes a `.tflite` file: signatures, weights, and what a runtime must know of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import tfgptopt
from tfgptopt.decoder import DecoderSpec, read_decoder
from tfgptopt.exporting.tflite.builder import Model
from tfgptopt.exporting.tflite.decoder_graph import Step, add_step
from tfgptopt.exporting.writing import replacing
from tfgptopt.generation.container import FORMAT_VERSION, METADATA_NAME
from tfgptopt.recipe import recipe_of

_SMALLEST_WINDOW = 128
_PREFILL_LENGTHS = (32, 128)
_SCORE_LENGTH = 128


def plan_signatures(context_length: int) -> dict[str, list[Step]]:
    """Returns the signatures of a file, by what they are for.

    `decode` reads one token and attends to a window of the cache, the next power of two and the
    whole context being the widest; `prefill` reads many without logits; `score` gives all logits.
    """
    windows = []
    window = _SMALLEST_WINDOW
    while window < context_length:
        windows.append(window)
        window *= 2
    windows.append(context_length)
    # A short one for short prompts, where the context is not short itself.
    lengths = [n for n in _PREFILL_LENGTHS if n < context_length // 4] or [context_length]
    score = min(_SCORE_LENGTH, context_length)
    return {
        "decode": [Step(f"decode_{w}", 1, w, logits=True) for w in windows],
        "prefill": [Step(f"prefill_{n}", n, context_length, logits=False) for n in lengths],
        "score": [Step(f"score_{score}", score, context_length, logits=True)],
    }


def _with_context(spec: DecoderSpec, context_length: int | None) -> DecoderSpec:
    if context_length is None:
        return spec
    if not isinstance(context_length, int) or not 2 <= context_length <= spec.context_length:
        raise ValueError(
            f"`context_length` must be an int from 2 to {spec.context_length}, the positions that "
            f"the model has. Received: {context_length!r}"
        )
    positions = np.ascontiguousarray(spec.position_embedding[:context_length])
    return replace(spec, context_length=context_length, position_embedding=positions)


def _tokenizer_json(preprocessor: Any) -> str | None:
    """Returns the tokenizer in the format of the `tokenizers` library."""
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        raise ValueError(
            f"Cannot store a {type(tokenizer).__name__}: only byte-pair tokenizers can be. "
            "Set `model.preprocessor = None` and work with token ids."
        )
    tokenizer("")  # KerasHub makes its backend on first use.
    text: str = tokenizer._tokenizer.to_str()
    return text


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
    norms = [spec.final_norm]
    matrices = [spec.token_embedding]
    for block in spec.blocks:
        norms += [block.attention_norm, block.feedforward_norm]
        matrices += [block.query, block.key, block.value, block.output, block.up, block.down]
    arrays = [spec.position_embedding, *(array for n in norms for array in (n.gamma, n.beta))]
    for matrix in matrices:
        arrays.append(matrix.values if matrix.integers is None else matrix.integers)
        arrays += [] if matrix.bias is None else [matrix.bias]
    return arrays, [matrix.scale for matrix in matrices if matrix.scale is not None]


def _describe_weights(spec: DecoderSpec) -> dict[str, Any]:
    """Returns how many weights there are, how many are not zero, and a hash of their bytes."""
    arrays, scales = _arrays(spec)
    digest = hashlib.sha256()
    for array in (*arrays, *scales):
        digest.update(array.tobytes())
    return {
        "parameters": sum(array.size for array in arrays),
        "nonzero": sum(int(np.count_nonzero(array)) for array in arrays),
        "sha256": digest.hexdigest(),
    }


def _metadata(model: Any, spec: DecoderSpec, steps: dict[str, list[Step]]) -> dict[str, Any]:
    preprocessor = getattr(model, "preprocessor", None)
    sizes = {
        kind: {s.name: s.window if kind == "decode" else s.length for s in steps[kind]}
        for kind in steps
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
            "num_heads": spec.num_heads,
            "head_dim": spec.head_dim,
            "context_length": spec.context_length,
            "vocabulary_size": spec.vocabulary_size,
        },
        "signatures": sizes,
        "generation": _generation_defaults(preprocessor),
        "recipe": recipe.to_config() if recipe else None,
        "weights": _describe_weights(spec),
        "tokenizer": _tokenizer_json(preprocessor),
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
    spec = _with_context(read_decoder(model), context_length)
    steps = plan_signatures(spec.context_length)
    file = Model(f"{spec.family} by tfgptopt {tfgptopt.__version__}")
    for step in (step for kind in steps.values() for step in kind):
        add_step(file, spec, step)
    metadata = _metadata(model, spec, steps)
    file.metadata(METADATA_NAME, json.dumps(metadata, ensure_ascii=False).encode())
    with replacing(target) as temporary:
        temporary.write_bytes(file.tobytes())
