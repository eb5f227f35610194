"""Writes what was trained to a file or folder that runs without Keras."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import keras

from tfgptopt.data.chats import ChatTemplate, with_template
from tfgptopt.exporting.formats import Format, check_format, format_of, register_format
from tfgptopt.exporting.litertlm.format import LiteRTLM
from tfgptopt.exporting.saved_model.format import SavedModel
from tfgptopt.exporting.tflite.format import TFLite
from tfgptopt.file.replacing import check_target, replacing
from tfgptopt.model.finite import check_finite_weights
from tfgptopt.terminal.progress import Verbose, showing, stage

__all__ = ["Format", "LiteRTLM", "SavedModel", "TFLite", "export", "register_format"]

register_format(TFLite)
register_format(LiteRTLM)
register_format(SavedModel)


def export(
    model: keras.Layer,
    path: str | Path,
    format: Format | None = None,
    overwrite: bool = False,
    verbose: Verbose = "auto",
    draft: keras.Model | None = None,
    chat_template: ChatTemplate | str | None = None,
) -> Path:
    """Exports a model as TFLite (a name that ends with `.tflite`), LiteRT-LM (`.litertlm`) or
    SavedModel (a folder).

    The model may be dressed by pruning and quantization, finalized, or plain (float32 weights).
    It is not changed.

    Args:
        model: A built Keras 3 model.
        path: Where to write.
        format: `TFLite(...)`, `LiteRTLM(...)`, `SavedModel()`, or another that was written for
            this. Defaults to `None`: what the name of `path` stands for, with its default settings.
        overwrite: bool. Replace an existing file or folder. Defaults to `False`.
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.
        draft: A smaller model of the same tokens, which a `.tflite` file carries to guess what the
            model says: `generate(prompt, speculative="auto")`. Weights that both have are in the
            file once, so that one with fewer layers of the same adds little. Defaults to `None`.
        chat_template: What `.tflite` and `.litertlm` files write messages by: a `ChatTemplate`, the
            name of a known one, or Jinja. Defaults to `None`: that of the model.

    Returns:
        `path`, as a `pathlib.Path`.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is false.
        ValueError: If the model is not built, its configuration cannot be exported, the settings
            of the format do not fit it, or `path` has the name of another format. Nothing is
            written then.

    Example:

    ```python
    tfgptopt.export(gpt, "gpt.tflite")
    print(tfgptopt.TFLiteCausalLM("gpt.tflite").generate("import os"))
    tfgptopt.export(gpt, "short.tflite", TFLite(context_length=256))
    tfgptopt.export(gpt, "gpt.litertlm")  # For phones; needs `litert-lm-builder`.
    tfgptopt.export(gpt, "gpt_saved_model")
    ```
    """
    target = check_target(path, overwrite)
    chosen = format_of(target) if format is None else format
    check_format(chosen, target)
    if not getattr(model, "built", False):
        raise ValueError(f"The model {model!r} is not built, so there are no weights to export.")
    check_finite_weights(model)
    if draft is None:
        write = partial(chosen.write, model)
    elif isinstance(chosen, TFLite):
        check_finite_weights(draft)
        write = partial(chosen.write, model, draft=draft)
    else:
        raise ValueError(f"A `draft` is for `.tflite` files. Received: '{target}'")
    if chat_template is not None and isinstance(chosen, SavedModel):
        raise ValueError(f"A SavedModel has no chat template. Received: {chat_template!r}")
    saying = with_template(model, chat_template)
    with showing(verbose), saying, stage(f"Writing {target.name}"), replacing(target) as temporary:
        write(temporary)
    return target
