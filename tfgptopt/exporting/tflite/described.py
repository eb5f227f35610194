"""The file of a causal LM whose family has a reader: its graphs are written here, operator by
operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import keras
import numpy as np

import tfgptopt
from tfgptopt.decoder import DecoderSpec, read_known
from tfgptopt.decoder.mixtures import Mixture
from tfgptopt.exporting.tflite.builder import Model
from tfgptopt.exporting.tflite.decoder_graph import add_signatures
from tfgptopt.exporting.tflite.describing import (
    PREFILL_LENGTHS,
    Settings,
    context_of,
    describe,
    describe_weights,
    growing_steps,
    masked_steps,
    plan_signatures,
    steps_of,
)
from tfgptopt.exporting.tflite.sparsity import LOWEST_SPARSITY, kept_blocks
from tfgptopt.families import layout_of
from tfgptopt.file.metadata import (
    CacheDtype,
    Carried,
    DecoderShape,
    Metadata,
    Signature,
    Signatures,
)
from tfgptopt.file.names import DRAFT, window_positions

# Half precision tells all whole numbers apart up to here.
_EXACT_IN_HALF = 2048


def described_file(
    model: keras.Model,
    settings: Settings,
    batch_sizes: Sequence[int] = (),
    draft: keras.Model | None = None,
) -> memoryview:
    """Returns the file of a model whose family has a reader.

    Args:
        model: A causal LM.
        settings: The format.
        batch_sizes: How many texts are decoded together. Defaults to none.
        draft: A smaller model of the same tokens that the file carries, too. Defaults to `None`.

    Raises:
        ValueError: If its configuration cannot be exported, or the settings or the draft do not
            fit it.
    """
    file, about = described_model(
        model, settings, batch_sizes=batch_sizes, share_equal=draft is not None, windows=True
    )
    if draft is not None:
        about = replace(about, draft=add_draft(file, draft, about.decoder))
    for name, data in about.entries().items():
        file.metadata(name, data)
    return file.pack()


def described_model(
    model: keras.Model,
    settings: Settings,
    prefill: Sequence[int] = PREFILL_LENGTHS,
    growing: bool = False,
    batch_sizes: Sequence[int] = (),
    share_equal: bool = False,
    windows: bool = False,
    masked: bool = False,
) -> tuple[Model, Metadata]:
    """Returns the graphs of a model whose family has a reader, and what is to be said of them.

    Args:
        model: A causal LM.
        settings: The format.
        prefill: Lengths of prefill. Defaults to those of a `.tflite` file.
        growing: Whether there are signatures with which LiteRT-LM makes caches grow, too.
            Defaults to `False`.
        batch_sizes: How many texts are decoded together. Defaults to none.
        share_equal: Whether weights of equal content share their bytes. Defaults to `False`.
        windows: Whether caches of layers with a window may end with it. Defaults to `False`.
        masked: Whether there are signatures with a mask for an input, for GPUs, too. Defaults to
            `False`.

    Raises:
        ValueError: If its configuration cannot be exported, or the settings do not fit it.
    """
    _warn_of_towers(model)
    spec = read_known(model)
    context = context_of(model, spec.context_length, settings.context_length)
    _check_settings(spec, settings)
    mixed = any(isinstance(block.feedforward, Mixture) for block in spec.blocks)
    if growing and (mixed or spec.layer_inputs is not None or spec.streams is not None):
        raise ValueError(
            f"`growing_cache` is not for {type(model).__name__}: caches grow for families with one "
            "stream and no experts. Leave it at False."
        )
    spec = spec.with_context(context)
    if masked:
        _check_half(type(model).__name__, spec)
    signatures = plan_signatures(context, prefill, growing or masked, batch_sizes)
    file = Model(f"{spec.family} by tfgptopt {tfgptopt.__version__}", settings.sparse, share_equal)
    steps = steps_of(signatures) + (growing_steps() if growing else [])
    windowed = windowed_layers(spec, signatures) if windows else ()
    steps += masked_steps(signatures) if masked else []
    add_signatures(file, spec, steps, settings.cache_dtype, windowed=windowed)
    decoder = _shape_of(spec, context, settings.cache_dtype, windowed)
    return file, describe(model, decoder, signatures, describe_weights(*_arrays(spec)))


def add_draft(file: Model, draft: keras.Model, decoder: DecoderShape) -> Carried:
    """Adds the signatures of a smaller model to a file; weights that are equal are there once.

    Args:
        file: The file.
        draft: The smaller model.
        decoder: Of the model that it guesses for.

    Returns:
        What is to be said of it.

    Raises:
        ValueError: If it has no reader, or other tokens.
    """
    spec = read_known(draft)
    if spec.vocabulary_size != decoder.vocabulary_size:
        raise ValueError(
            f"The draft knows {spec.vocabulary_size} tokens, and the model that it guesses for "
            f"{decoder.vocabulary_size}. Give one of the same tokens, such as one that was shrunk "
            "from it."
        )
    context = min(decoder.context_length, spec.context_length or decoder.context_length)
    spec, dtype = spec.with_context(context), decoder.cache_dtype
    planned = plan_signatures(context, PREFILL_LENGTHS)
    signatures = Signatures(
        decode=Signature(1, f"{DRAFT}_{planned.decode.name}"),
        prefill=tuple(Signature(n, f"{DRAFT}_{name}") for n, name in planned.prefill),
        score=(),
    )
    windowed = windowed_layers(spec, signatures)
    add_signatures(file, spec, steps_of(signatures), dtype, growth=False, windowed=windowed)
    return Carried(_shape_of(spec, context, dtype, windowed), signatures)


def windowed_layers(spec: DecoderSpec, signatures: Signatures) -> tuple[int, ...]:
    """Returns the layers of the cache whose rows need not all be held, if that saves any."""
    windows = {
        i: window
        for i, block in enumerate(spec.caches)
        if (window := spec.blocks[block].attention.window) is not None
    }
    chunk = max(signature.length for signature in (*signatures.prefill, *signatures.score))
    assert spec.context_length is not None
    if not windows or window_positions(max(windows.values()), chunk) >= spec.context_length:
        return ()
    return tuple(windows)


def _shape_of(
    spec: DecoderSpec, context: int, cache_dtype: CacheDtype, windowed: tuple[int, ...]
) -> DecoderShape:
    heads, _, head_dim = spec.caches[0]
    found = [spec.blocks[block].attention.window for block in spec.caches]
    windows = [found[i] or 0 for i in windowed]
    return DecoderShape(
        num_layers=len(spec.caches),
        num_heads=spec.blocks[0].attention.num_heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        cache_dtype=cache_dtype,
        resizable=True,
        context_length=context,
        vocabulary_size=spec.vocabulary_size,
        window=max(windows, default=0),
        windowed_layers=windowed,
    )


def _warn_of_towers(model: keras.Model) -> None:
    """Says which encoders of a model are not in its file."""
    backbone, layout = getattr(model, "backbone", model), layout_of(model)
    towers = [name for name in layout.towers if getattr(backbone, name, None)] if layout else []
    if towers:
        warnings.warn(
            f"The file holds the text part of {type(model).__name__}, without its "
            f"{' and '.join(towers)}: it reads text only.",
            stacklevel=5,
        )


def _check_settings(spec: DecoderSpec, settings: Settings) -> None:
    """Raises where a decoder cannot have what is asked for.

    Raises:
        ValueError: For empty blocks that no weight has, and int8 caches of grouped queries.
    """
    matrices = spec.matrices() if settings.sparse else ()
    if settings.sparse and not any(kept_blocks(matrix.values) is not None for matrix in matrices):
        raise ValueError(
            "`sparse=True` leaves out empty blocks of four inputs, and no float32 weight has at "
            f"least {LOWEST_SPARSITY:.0%} of them. Prune with `Block(4, 1)`, and do not quantize "
            "these weights: LiteRT has no kernel for sparse integers."
        )
    heads, groups = spec.blocks[0].attention.num_heads, spec.caches[0][0]
    if settings.cache_dtype == "int8" and heads > groups:
        raise ValueError(
            "`cache_dtype='int8'` is for models whose query heads each have their own keys: with "
            f"{heads} heads on {groups} it is no faster than 'float32', and takes "
            "more memory."
        )


def _check_half(name: str, spec: DecoderSpec) -> None:
    """Raises where a decoder computes what half precision cannot hold.

    Raises:
        ValueError: If it does.
    """
    context = spec.context_length or 0
    if any(isinstance(block.feedforward, Mixture) for block in spec.blocks):
        raise ValueError(
            f"`accelerator='gpu'` is not for {name}: which experts a token is sent to is found "
            "with numbers beyond half precision, and branches. Leave it at 'cpu'."
        )
    attentions = [block.attention for block in spec.blocks]
    if context > _EXACT_IN_HALF and any(
        one.alibi is not None or (one.window or context) < context for one in attentions
    ):
        raise ValueError(
            f"`accelerator='gpu'` counts positions in half precision, for the windows or ALiBi of "
            f"{name}: up to {_EXACT_IN_HALF}. Received: a context of {context}. Give a "
            "`context_length` of no more."
        )


def _arrays(spec: DecoderSpec) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the weights of a decoder, integers where there are any, and the scales of those."""
    arrays, scales = [], []
    if spec.position_embedding is not None:
        arrays.append(spec.position_embedding)
    for norm in spec.norms():
        arrays += [array for array in (norm.gamma, norm.beta) if array is not None]
    arrays += [a.sinks for a in (b.attention for b in spec.blocks) if a.sinks is not None]
    for block in spec.blocks:
        if block.altup is not None and block.altup.output_scale is not None:
            arrays.append(block.altup.output_scale)
    for matrix in spec.matrices():
        arrays += [matrix.values] if matrix.bias is None else [matrix.values, matrix.bias]
        scales += [] if matrix.scale is None else [matrix.scale]
    return arrays, scales
