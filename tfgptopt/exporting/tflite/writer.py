"""Writes a `.tflite` file: signatures, weights, and what a runtime must know of them."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

import tfgptopt
from tfgptopt.decoder import DecoderSpec, Matrix, read_decoder, why_unreadable
from tfgptopt.decoder.reading import as_floats
from tfgptopt.exporting.tflite import constants, converting
from tfgptopt.exporting.tflite.builder import Model
from tfgptopt.exporting.tflite.decoder_graph import Step, add_signatures
from tfgptopt.exporting.tflite.kv_cache import CACHE_DTYPES, CacheDtype
from tfgptopt.exporting.tflite.packing import pack
from tfgptopt.exporting.tflite.sparsity import LOWEST_SPARSITY, kept_blocks
from tfgptopt.exporting.tokenizers import end_token_ids, tokenizer_json
from tfgptopt.file.container import FORMAT_VERSION, METADATA_NAME, seal
from tfgptopt.file.replacing import replacing
from tfgptopt.recipe import recipe_of

# Of models that have any number of positions: KerasHub's own default length of a text.
_DEFAULT_CONTEXT = 1024
# Lengths of prefill: the best for a long prompt, and one for what is left of it.
_CHUNK, _SHORT_CHUNK = 128, 32


def plan_signatures(context_length: int, short: bool = True) -> dict[str, list[Step]]:
    """Returns the signatures of a file, by what they are for.

    `decode` reads one token; `prefill` reads many without logits; `score` gives all logits. They
    are few, since each takes time to load, and memory.

    Args:
        context_length: Positions of the cache.
        short: Whether there is one for short prompts. Defaults to `True`.
    """
    chunk = min(context_length, _CHUNK)
    lengths = [_SHORT_CHUNK, chunk] if short and chunk > _SHORT_CHUNK else [chunk]
    return {
        "decode": [Step("decode", 1, True)],
        "prefill": [Step(f"prefill_{length}", length, False) for length in lengths],
        "score": [Step(f"score_{chunk}", chunk, True)],
    }


def _context(model: Any, largest: int | None, wanted: int | None) -> int:
    """Returns how many positions the cache holds: as many as asked for, or as fit the model."""
    if wanted is None:
        preprocessor = getattr(model, "preprocessor", None)
        given = getattr(preprocessor, "sequence_length", None)
        wanted = largest or given or _DEFAULT_CONTEXT
    if not isinstance(wanted, int) or not 2 <= wanted <= (largest or 2**24):
        limits = f"from 2 to {largest}, the positions that the model has" if largest else ">= 2"
        raise ValueError(f"`context_length` must be an int {limits}. Received: {wanted!r}")
    return wanted


def _generation_defaults(preprocessor: Any) -> dict[str, Any]:
    tokenizer = getattr(preprocessor, "tokenizer", None)
    starts = getattr(preprocessor, "add_start_token", False)
    return {
        "start_token_id": getattr(tokenizer, "start_token_id", None) if starts else None,
        "end_token_ids": end_token_ids(tokenizer),
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


def _describe_weights(arrays: list[np.ndarray], scales: list[np.ndarray]) -> dict[str, Any]:
    """Returns how many weights there are, how many are not zero, and a hash of their bytes."""
    digest = hashlib.sha256()
    for array in (*arrays, *scales):
        digest.update(np.ascontiguousarray(array).data)
    return {
        "parameters": sum(array.size for array in arrays),
        "nonzero": sum(int(np.count_nonzero(array)) for array in arrays),
        "sha256": digest.hexdigest(),
    }


def _metadata(
    model: Any,
    decoder: dict[str, Any],
    steps: dict[str, list[Step]],
    weights: dict[str, Any],
) -> bytes:
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    backbone = getattr(model, "backbone", model)
    lengths = {kind: {step.name: step.length for step in steps[kind]} for kind in steps}
    recipe = recipe_of(model)
    about = {
        "format_version": FORMAT_VERSION,
        "versions": {
            "tfgptopt": tfgptopt.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "keras_hub": keras_hub.__version__,
        },
        "source": {
            "class": type(model).__name__,
            "family": type(backbone).__name__,
            "config": keras.saving.serialize_keras_object(backbone)["config"],
        },
        "decoder": decoder,
        "signatures": lengths,
        "generation": _generation_defaults(preprocessor),
        "recipe": recipe.to_config() if recipe else None,
        "weights": weights,
        "tokenizer": None if tokenizer is None else tokenizer_json(tokenizer),
    }
    return json.dumps(about, ensure_ascii=False).encode()


def _decoder_file(
    model: keras.Model, context_length: int | None, sparse: bool, cache_dtype: CacheDtype
) -> memoryview:
    """Returns the file of a model whose family has a reader."""
    spec = read_decoder(model)
    context = _context(model, spec.context_length, context_length)
    if sparse:
        _check_sparse(spec)
    if cache_dtype == "int8" and spec.blocks[0].attention.num_heads > spec.cache_shape[0]:
        raise ValueError(
            "`cache_dtype='int8'` is for models whose query heads each have their own keys: with "
            f"{spec.blocks[0].attention.num_heads} heads on {spec.cache_shape[0]} it is no faster "
            "than 'float32', and takes more memory."
        )
    spec, steps = spec.with_context(context), plan_signatures(context)
    file = Model(f"{spec.family} by tfgptopt {tfgptopt.__version__}", sparse)
    add_signatures(file, spec, (step for kind in steps.values() for step in kind), cache_dtype)
    decoder = {
        "num_layers": len(spec.blocks),
        "num_heads": spec.blocks[0].attention.num_heads,
        "num_key_value_heads": spec.cache_shape[0],
        "head_dim": spec.cache_shape[2],
        "cache_dtype": cache_dtype,
        "resizable": True,
        "context_length": context,
        "vocabulary_size": spec.vocabulary_size,
    }
    weights = _describe_weights(*_arrays(spec))
    file.metadata(METADATA_NAME, _metadata(model, decoder, steps, weights))
    return file.pack()


def _converted_causal_lm(model: Any, context_length: int | None) -> memoryview:
    """Returns the file of any other causal LM of KerasHub."""
    warnings.warn(
        f"No reader describes {type(model).__name__}: it is exported through TensorFlow's "
        "converter, with the same signatures. That takes longer, and the file is larger and "
        "several times slower than one of a known family.",
        stacklevel=4,
    )
    context = _context(model, None, context_length)
    steps = plan_signatures(context, short=False)  # Each costs a conversion.
    matrices = converting.quantized_matrices(model)
    with converting.ready_to_convert(model):
        count, shape = converting.cache_shape(model, context)
        flat = (step for kind in steps.values() for step in kind)
        file = converting.convert_causal_lm(model, flat, count, shape)
        values = [as_floats(variable) for variable in model.weights]
    _store_integers(file, matrices)
    decoder = {
        "num_layers": count,
        "num_heads": getattr(model.backbone, "num_query_heads", shape[0]),
        "num_key_value_heads": shape[0],
        "head_dim": shape[2],
        "cache_dtype": "float32",
        "resizable": False,
        "context_length": context,
        "vocabulary_size": model.backbone.vocabulary_size,
    }
    data = _metadata(model, decoder, steps, _describe_weights(values, []))
    file.buffers.append(schema.BufferT(data=np.frombuffer(data, np.uint8)))
    entry = schema.MetadataT(name=METADATA_NAME, buffer=len(file.buffers) - 1)
    file.metadata = [*(file.metadata or []), entry]
    return pack(file)


def _converted_model(model: keras.Model, context_length: int | None) -> memoryview:
    """Returns the file of a model that is no causal LM, as Keras exports it."""
    if context_length is not None:
        raise ValueError("`context_length` sizes the KV cache of a causal LM only.")
    matrices = converting.quantized_matrices(model)
    with converting.ready_to_convert(model):
        file = converting.convert_any(model)
    foreign = constants.operators_of_tensorflow(file)
    if foreign:
        warnings.warn(
            f"The file of '{model.name}' has operators of TensorFlow ({', '.join(foreign)}): it "
            "needs a runtime that is built with them.",
            stacklevel=4,
        )
    _store_integers(file, matrices)
    return pack(file)


def _store_integers(file: schema.ModelT, matrices: list[Matrix]) -> None:
    found = constants.store_integers(file, matrices)
    lost = [matrix.name for matrix in matrices if matrix.name not in found]
    if lost:
        warnings.warn(
            f"{len(lost)} of {len(matrices)} quantized weights stay float32 in the file, since the "
            f"converter changed them: {', '.join(lost[:3])}",
            stacklevel=5,
        )


def _check_sparse(spec: DecoderSpec) -> None:
    """Raises unless a matrix has the zeros that a sparse file can leave out."""
    if not any(kept_blocks(matrix.values) is not None for matrix in spec.matrices()):
        raise ValueError(
            "`sparse=True` leaves out empty blocks of four inputs, and no float32 weight has at "
            f"least {LOWEST_SPARSITY:.0%} of them. Prune with `Block(4, 1)`, and do not quantize "
            "these weights: LiteRT has no kernel for sparse integers."
        )


def write_tflite(
    model: keras.Model,
    target: Path,
    context_length: int | None,
    sparse: bool = False,
    cache_dtype: CacheDtype = "float32",
) -> None:
    """Writes a model as a `.tflite` file.

    Args:
        model: A built model, dressed or plain.
        target: The file.
        context_length: Positions of the KV cache, in tokens, or `None` for all.
        sparse: Whether to leave out empty blocks of float32 weights.
        cache_dtype: `"float32"` or `"int8"`.

    Raises:
        ValueError: If the model cannot be exported, `context_length` or `cache_dtype` is out of
            range, or `sparse` is asked for and no weight has empty blocks to leave out.
    """
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"`cache_dtype` must be one of {CACHE_DTYPES}. Received: {cache_dtype!r}")
    reason = why_unreadable(model)
    for setting in ["sparse=True"] * sparse + ["cache_dtype='int8'"] * (cache_dtype == "int8"):
        if reason:
            raise ValueError(f"`{setting}` needs a reader for {type(model).__name__}.")
    if reason is None:
        data = _decoder_file(model, context_length, sparse, cache_dtype)
    elif isinstance(model, keras_hub.models.CausalLM):
        data = _converted_causal_lm(model, context_length)
    else:
        data = _converted_model(model, context_length)
    with replacing(target) as temporary, temporary.open("wb") as stream:
        stream.write(data)
        stream.write(seal(data))
