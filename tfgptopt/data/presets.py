"""Loads pretrained models, with the chat template that comes with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import keras
import keras_hub

from tfgptopt.data.chats import load_template, set_template, template_of
from tfgptopt.data.encoding import tokenizer_of
from tfgptopt.model.turning import STORED, accepting_turns

_WEIGHTS = ("*.weights.h5", "*.weights.json", "*.safetensors")


def load_preset(preset: str | Path, dtype: str | None = None) -> keras.Model:
    """Loads a pretrained causal LM, and the chat template of its folder.

    Args:
        preset: Folder or name of a KerasHub preset, an `hf://` handle, or a local Hugging Face
            folder with safetensors.
        dtype: str. Policy of its layers, such as `"bfloat16"`. Defaults to `None`: as stored.

    Returns:
        A `keras_hub.models.CausalLM`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder lacks a file, its template does not compile, or KerasHub cannot
            load it.

    Example:

    ```python
    gpt.save_to_preset("my_gpt")
    again = tfgptopt.data.load_preset("my_gpt")
    ```
    """
    name, folder = str(preset), Path(preset)
    if folder.is_dir():
        found = any(next(folder.glob(kind), None) for kind in _WEIGHTS)
        missing = "config.json" if not (folder / "config.json").is_file() else ""
        missing = missing or ("" if found else "weights (*.weights.h5, *.safetensors)")
        if missing:
            raise ValueError(f"The preset folder '{name}' has no {missing}.")
    elif os.sep in name and ":" not in name:
        raise FileNotFoundError(f"There is no preset folder '{name}'.")
    template = load_template(folder) if folder.is_dir() else None
    try:
        options = {"dtype": dtype} if dtype else {}
        turned = _has_turned_weights(folder)
        model = keras_hub.models.CausalLM.from_preset(name, load_weights=not turned, **options)
        if turned:
            load_weights(model.backbone, _weights_of(folder))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        if not isinstance(error, ValueError) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"KerasHub cannot load the preset '{name}': {reason}") from None
    if template is not None:
        set_template(model, template)
    return model


def load_weights(model: keras.Model, path: str | Path) -> None:
    """Loads weights that Keras saved into a plain model, also those of a model that was rotated.

    Keras alone refuses these: they mean nothing to a model that does not turn its features. Here it
    does so from then on.

    Args:
        model: A model of the same architecture, plain.
        path: A `.weights.h5` file, or the `.weights.json` of several.

    Raises:
        ValueError: If the file is of another model.

    Example:

    ```python
    tfgptopt.quantize(gpt, Int8(), "rotation")
    gpt.save_weights("gpt.weights.h5")
    tfgptopt.data.load_weights(tfgptopt.model.cloning.clone(gpt), "gpt.weights.h5")
    ```
    """
    with accepting_turns(model):
        model.load_weights(str(path))


def _weights_of(folder: Path) -> Path:
    """Returns the file of a preset's weights, or the index of several."""
    index = folder / "model.weights.json"
    return index if index.is_file() else folder / "model.weights.h5"


def _has_turned_weights(folder: Path) -> bool:
    """Returns whether the weights of a preset are those of a model that was rotated."""

    def turned(name: str) -> bool | None:
        return True if name.endswith(f"/{STORED}") else None

    for path in folder.glob("model*.weights.h5") if folder.is_dir() else ():
        with h5py.File(path, "r") as file:
            if file.visit(turned):
                return True
    return False


def reading_tokenizer(model: keras.Model, preset: str | Path) -> Any:
    """Returns the tokenizer of a model that was loaded from a preset, to read text with.

    Raises:
        ValueError: If it has none.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise ValueError(
            f"The preset '{preset}' has no tokenizer, so no text can be read with it. Save it with "
            "its preprocessor: `CausalLM(backbone, preprocessor=...).save_to_preset(folder)`."
        )
    return tokenizer


def save_preset(model: keras.Model, folder: str | Path) -> None:
    """Saves a causal LM as a preset, with its chat template.

    Args:
        model: A `keras_hub.models.CausalLM`.
        folder: The folder to write.
    """
    model.save_to_preset(str(folder))
    template = template_of(model)
    if template is not None:
        (Path(folder) / "chat_template.jinja").write_text(template.source, "utf-8")
        names = {"bos_token": template.bos_token, "eos_token": template.eos_token}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
