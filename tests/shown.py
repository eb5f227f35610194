"""What examples of docstrings and documents find: a small model, a folder, names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from data.chatty import CHATS, gemma_tokenizer

import tfgptopt
from tfgptopt.data import Corpus


def small_gpt(corpus: Corpus, layers: int = 1) -> keras.Model:
    """Returns a compiled GPT-2 that trains on windows of tokens."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        corpus.tokenizer.vocabulary_size(), layers, 2, 64, 128, 0.0, max_sequence_length=128
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    gpt = keras_hub.models.GPT2CausalLM(backbone, preprocessor)
    gpt.compile(optimizer="adam", sampler="greedy", weighted_metrics=[])
    gpt.preprocessor = None
    return gpt


def small_gemma() -> keras.Model:
    """Returns a Gemma with turns among its tokens."""
    tokenizer = gemma_tokenizer()
    backbone = keras_hub.models.GemmaBackbone(tokenizer.vocabulary_size(), 1, 2, 1, 32, 64, 16)
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=160)
    gemma = keras_hub.models.GemmaCausalLM(backbone, preprocessor)
    gemma.compile(optimizer="adam", sampler="greedy", weighted_metrics=[])
    return gemma


def fill_folder(folder: Path, corpus: Corpus, texts: Path) -> None:
    """Writes what examples read: files, presets, notes, chats."""
    gpt = small_gpt(corpus)
    gpt.preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer)
    tfgptopt.export(gpt, folder / "gpt.tflite")
    for name in ("small_gpt", "my_preset"):
        gpt.save_to_preset(str(folder / name))
    (folder / "notes").mkdir()
    for path in texts.rglob("*.py"):
        shutil.copy(path, folder / "notes" / f"{path.stem}.md")
    lines = [json.dumps({"messages": messages}) for messages in CHATS]
    (folder / "chats.jsonl").write_text("\n".join(lines), "utf-8")


def names_of(
    gpt: keras.Model | None, corpus: Corpus, lm: tfgptopt.TFLiteCausalLM
) -> dict[str, Any]:
    """Returns what examples take for defined."""
    return {
        "np": np,
        "keras": keras,
        "keras_hub": keras_hub,
        "tf": tf,
        "tfgptopt": tfgptopt,
        "gpt": gpt,
        "model": gpt,
        "corpus": corpus,
        "data": corpus.train.take(4),
        "windows": corpus.train.take(8),
        "validation": corpus.validation,
        "lm": lm,
    }
