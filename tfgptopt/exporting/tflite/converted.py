"""Files of models that no reader describes: what TensorFlow's converter gives, with the integers
that training rounded to in place of the floats.
"""

from __future__ import annotations

import warnings

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.decoder import Matrix
from tfgptopt.decoder.reading import as_floats
from tfgptopt.exporting.tflite import constants, converting
from tfgptopt.exporting.tflite.describing import (
    PREFILL_LENGTHS,
    Settings,
    context_of,
    describe,
    describe_weights,
    plan_signatures,
    steps_of,
)
from tfgptopt.exporting.tflite.packing import pack
from tfgptopt.file.metadata import DecoderShape


def converted_causal_lm_file(model: keras.Model, settings: Settings) -> memoryview:
    """Returns the file of a causal LM of KerasHub, with the signatures of a known family.

    Args:
        model: A causal LM.
        settings: The format.

    Raises:
        ValueError: If the model holds its cache in another form than most of KerasHub do, or
            cannot be converted.
    """
    warnings.warn(
        f"No reader describes {type(model).__name__}: it is exported through TensorFlow's "
        "converter, with the same signatures. That takes longer, and the file is larger and "
        "several times slower than one of a known family.",
        stacklevel=4,
    )
    context = context_of(model, None, settings.context_length)
    signatures = plan_signatures(context, PREFILL_LENGTHS[-1:])  # Each costs a conversion.
    matrices = converting.quantized_matrices(model)
    with converting.ready_to_convert(model):
        count, shape = converting.cache_shape(model, context)
        file = converting.convert_causal_lm(model, steps_of(signatures), count, shape)
        values = [as_floats(variable) for variable in model.weights]
    _store_integers(file, matrices)
    decoder = DecoderShape(
        num_layers=count,
        num_heads=getattr(model.backbone, "num_query_heads", shape[0]),
        num_key_value_heads=shape[0],
        head_dim=shape[2],
        cache_dtype="float32",
        resizable=False,
        context_length=context,
        vocabulary_size=model.backbone.vocabulary_size,
    )
    about = describe(model, decoder, signatures, describe_weights(values))
    for name, blob in about.entries().items():
        file.buffers.append(schema.BufferT(data=np.frombuffer(blob, np.uint8)))
        entry = schema.MetadataT(name=name, buffer=len(file.buffers) - 1)
        file.metadata = [*(file.metadata or []), entry]
    return pack(file)


def converted_file(model: keras.Model, settings: Settings) -> memoryview:
    """Returns the file of a model that is no causal LM, as Keras exports it.

    Args:
        model: A built model.
        settings: The format.

    Raises:
        ValueError: If a context length is asked for, or the model cannot be converted.
    """
    if settings.context_length is not None:
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
