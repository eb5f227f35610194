"""How close an exported file is to the Keras model it came from.

Compares 20 prompts x 40 greedy tokens, and the logits of those texts, with the dressed model (the
arithmetic that was trained) and with the finalized one (plain layers, float activations).

    tfgptopt demo && python benchmarks/export_fidelity.py tfgptopt-demo
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import tfgptopt


def keras_logits(model: keras_hub.models.CausalLM, texts: np.ndarray) -> np.ndarray:
    """Returns all logits of a batch of texts."""
    inputs = {"token_ids": texts, "padding_mask": np.ones_like(texts)}
    return model.predict(inputs, verbose=0)


def keras_greedy(model: keras_hub.models.CausalLM, prompts: np.ndarray, new: int) -> np.ndarray:
    """Continues prompts with KerasHub's own generate."""
    model.compile(sampler="greedy")
    rows, length = prompts.shape
    padded = np.pad(prompts, ((0, 0), (0, new)))
    mask = np.broadcast_to(np.arange(length + new) < length, (rows, length + new))
    inputs = {"token_ids": padded, "padding_mask": mask}
    return model.generate(inputs, stop_token_ids=None)["token_ids"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output of `tfgptopt demo` or `optimize`")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    folder = arguments.folder
    finalized = keras_hub.models.CausalLM.from_preset(str(folder / "model"))
    dressed = keras_hub.models.CausalLM.from_preset(str(folder / "model"))
    tfgptopt.Recipe.load(folder / "recipe.yaml").replay(dressed)
    source = "import os\nimport sys\n\nclass Parser:\n    def parse(self, text):\n        return "
    tokens = np.asarray(finalized.preprocessor.tokenizer(source * 40))
    starts = range(0, 7 * arguments.prompts, 7)
    prompts = np.stack([tokens[s : s + 16] for s in starts]).astype(np.int32)
    for model in (finalized, dressed):
        model.preprocessor = None
    lm = tfgptopt.TFLiteCausalLM(folder / "model.tflite")
    made = np.asarray(
        lm.generate(prompts.tolist(), max_length=16 + arguments.new_tokens, stop=None), np.int32
    )
    cache = lm._engine.new_cache()
    scores = np.stack([lm._engine.score(cache, row) for row in made])
    headings = ("against Keras", "logits\nstd", "median\nerror", "largest\nerror")
    table = Table(*headings, "within\n0.02", "next token\nequal", "greedy\nequal")
    for name, model in (("dressed", dressed), ("finalized", finalized)):
        logits = keras_logits(model, made)
        difference = np.abs(scores - logits)
        same = (scores.argmax(-1) == logits.argmax(-1)).mean()
        greedy = (keras_greedy(model, prompts, arguments.new_tokens) == made)[:, 16:].mean()
        table.add_row(
            name,
            f"{logits.std():.2f}",
            f"{np.median(difference):.1e}",
            f"{difference.max():.4f}",
            f"{(difference <= 0.02).mean():.2%}",
            f"{same:.2%}",
            f"{greedy:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
