"""A distilled pair: a GPT-2 of 12 layers and its draft of 2, which one file carries.

    python benchmarks/distilled_draft.py            # trains for a quarter of an hour

Both are trained on the source code of Python's standard library: the large one, then two of its
layers by what it says. Held-out files are continued with and without the draft, by turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import speculation
from rich.console import Console

import tfgptopt
from tfgptopt.data import load_corpus
from tfgptopt.exporting import TFLite
from tfgptopt.generation import Draft, NGram, TFLiteCausalLM
from tfgptopt.quantization import Int8

LENGTH, PROMPT = 256, 96


def make(corpus: Any, width: int) -> Any:
    """Returns the large model."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=corpus.tokenizer.vocabulary_size(), num_layers=12, num_heads=width // 64,
        hidden_dim=width, intermediate_dim=4 * width, dropout=0.0, max_sequence_length=LENGTH,
    )  # fmt: skip
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=LENGTH
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


def train(model: Any, corpus: Any, steps: int, rate: float) -> float:
    """Trains, and returns the loss of the last steps."""
    schedule = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=rate,
                                                      warmup_steps=steps // 10)  # fmt: skip
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01, global_clipnorm=1.0)
    model.compile(optimizer=optimizer, **({} if isinstance(model, tfgptopt.Distiller) else {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }))  # fmt: skip
    with tfgptopt.data.tokens_as_input(getattr(model, "student", model)):
        data = corpus.train.repeat()
        history = model.fit(data, steps_per_epoch=steps // 5, epochs=5, verbose=2).history
    return float(history["loss"][-1])


def main() -> None:
    """Trains the pair, and prints how much faster the draft makes the large one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--draft-steps", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=20)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    corpus = load_corpus(None, vocabulary_size=2048, sequence_length=128, batch_size=8)
    model = make(corpus, options.width)
    train(model, corpus, options.steps, 1e-3)
    draft = tfgptopt.shrink(model, depth=2, calibration=corpus.train.take(8))
    train(tfgptopt.Distiller(draft, model), corpus, options.draft_steps, 1e-3)
    model, draft = (tfgptopt.quantize(one, Int8()) for one in (model, draft))
    held_out = [
        row
        for batch in corpus.validation.take(20).as_numpy_iterator()
        for row in batch[0]["token_ids"]
    ]
    prompts = [
        row[:PROMPT].tolist() for row in held_out[:: max(len(held_out) // options.prompts, 1)]
    ]
    table = speculation.table()
    with tempfile.TemporaryDirectory() as folder:
        path = tfgptopt.export(model, Path(folder) / "pair.tflite", TFLite(LENGTH), draft=draft)
        lm = TFLiteCausalLM(path)
        for kind in ("held-out code", "drawn"):
            for name, way in {"Draft": Draft(), "NGram": NGram()}.items():
                row = speculation.compared(lm, prompts[: options.prompts], way, kind)
                table.add_row(kind, name, *row)
    Console(width=80, highlight=False).print(table)


if __name__ == "__main__":
    main()
