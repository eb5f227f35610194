"""Writes what was trained to a file or folder that runs without Keras."""

from __future__ import annotations

from pathlib import Path

import keras

from tfgptopt.exporting import saved_model
from tfgptopt.exporting.tflite.kv_cache import CacheDtype
from tfgptopt.exporting.tflite.writer import write_tflite
from tfgptopt.file.replacing import check_target

__all__ = ["export"]


def export(
    model: keras.Layer,
    path: str | Path,
    context_length: int | None = None,
    overwrite: bool = False,
    sparse: bool = False,
    cache_dtype: CacheDtype = "float32",
) -> Path:
    """Exports a model as TFLite (a name that ends with `.tflite`) or SavedModel (a folder).

    The model may be dressed by pruning and quantization, finalized, or plain (float32 weights).
    It is not changed. What a `.tflite` file holds depends on the model:

    - A causal language model of a known family (Bloom, Falcon, Gemma 1 to 3, GPT-2, GPT-NeoX,
      Llama, Mistral, OPT, Phi-3, Qwen 2 and 3, SmolLM3): prefill and decode signatures with a KV
      cache, each weight once, as the integers that training rounded to, the tokenizer and the
      recipe. `TFLiteCausalLM` reads it, and so does any LiteRT runtime.
    - Any other causal language model of KerasHub, such as a mixture of experts: the same
      signatures, made by TensorFlow's converter from the model's `call_with_cache`. It warns: the
      export takes longer, and the file is larger and slower.
    - Any other Keras model: what `keras.Model.export` gives, with the weights of its quantized
      Dense, EinsumDense and Embedding layers as the integers that training rounded to.

    A SavedModel holds `serve`, and `generate` for a causal LM; TensorFlow loads it without Keras.

    Args:
        model: A built Keras 3 model.
        path: Where to write.
        context_length: int. For TFLite files of causal LMs, the most tokens that a text can have:
            the KV cache grows up to it. Defaults to `None`: all positions that the model has; of a
            model that has any number, the `sequence_length` of its preprocessor, or else 1024.
        overwrite: bool. Replace an existing file or folder. Defaults to `False`.
        sparse: bool. For TFLite, leave out the empty blocks of float32 weights that were pruned
            with `Block(4, 1)`: a smaller file, and one that decodes faster from about 60 % of
            zeros on. Defaults to `False`.
        cache_dtype: `"float32"` or `"int8"`. For TFLite files of causal LMs, how keys and values
            are held: as floats, exactly, or as integers with a scale for each position and head,
            in a quarter of the memory and faster to read behind long texts. `"int8"` is for
            models without grouped queries. Defaults to `"float32"`.

    Returns:
        `path`, as a `pathlib.Path`.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is false.
        ValueError: If the model is not built, its configuration cannot be exported, or
            `context_length` is out of range. Nothing is written then.

    Example:

    ```python
    tfgptopt.export(gpt, "gpt.tflite")
    print(tfgptopt.TFLiteCausalLM("gpt.tflite").generate("import os"))
    tfgptopt.export(gpt, "gpt_saved_model")
    ```
    """
    target = check_target(path, overwrite)
    if not getattr(model, "built", False):
        raise ValueError(f"The model {model!r} is not built, so there are no weights to export.")
    if target.suffix == ".tflite":
        write_tflite(model, target, context_length, sparse, cache_dtype)
    elif context_length is not None or sparse or cache_dtype != "float32":
        raise ValueError(
            "`context_length`, `sparse` and `cache_dtype` are for a .tflite file only."
        )
    else:
        saved_model.write_saved_model(model, target)
    return target
