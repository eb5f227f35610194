"""Quality and size of a mixture of experts as files of float32, int8 and int4.

A mixture of eight experts, of which two read each token, learns the demo's text; each file is
measured itself, and compared with the model in Keras by the divergence of its predictions. Pruning
at 50 % by the rows of each expert is compared with pruning by magnitude. With `--speed` two files
of one model with random weights take turns: one that computes only the chosen experts of a token,
as files do, and one that computes all.

    python benchmarks/mixtures.py              # some twenty minutes on one core
    python benchmarks/mixtures.py --steps 20   # to see that it runs
    python benchmarks/mixtures.py --speed      # a minute
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import tfgptopt
from tfgptopt.data import load_corpus, tokens_as_input
from tfgptopt.exporting.tflite import feedforward
from tfgptopt.pruning import SparseGPT, Wanda
from tfgptopt.quantization import Int4, Int8

CONTEXT = 128
SHAPE = {
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 256,
    "intermediate_dim": 320,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "top_k": 2,
}


def make(corpus: Any) -> keras.Model:
    """Returns a mixture with random weights, which reads the tokens of a corpus."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.MixtralBackbone(corpus.tokenizer.vocabulary_size(), **SHAPE)
    model = keras_hub.models.MixtralCausalLM(backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    return model


def variants(calibration: Any) -> dict[str, Callable[[keras.Model], object] | None]:
    """Returns what is done to the trained model for each row."""
    quantize, prune = tfgptopt.quantize, tfgptopt.prune
    return {
        "float32": None,
        "int8, to nearest": lambda m: quantize(m, Int8(), verbose=0),
        "int8, GPTQ": lambda m: quantize(m, Int8(), "gptq", calibration, verbose=0),
        "int4, to nearest": lambda m: quantize(m, Int4(), "mse", verbose=0),
        "int4, GPTQ": lambda m: quantize(m, Int4(), "gptq", calibration, verbose=0),
        "pruned 50 %, magnitude": lambda m: prune(m, 0.5, verbose=0),
        "pruned 50 %, Wanda": lambda m: prune(m, 0.5, score=Wanda(calibration), verbose=0),
        "pruned 50 %, SparseGPT": lambda m: prune(m, 0.5, score=SparseGPT(calibration), verbose=0),
    }


def main() -> None:
    """Trains, writes the files, measures them and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--weights", help="where trained weights are kept, or found")
    parser.add_argument("--speed", action="store_true", help="measure decoding instead")
    options = parser.parse_args()
    if options.speed:
        measure_speed()
        return
    corpus = load_corpus(sequence_length=CONTEXT)
    model = make(corpus)
    kept = Path(options.weights) if options.weights else None
    if kept is not None and kept.exists():
        model.load_weights(kept)
    else:
        with tokens_as_input(model):
            model.fit(corpus.train.repeat(), steps_per_epoch=options.steps, verbose=2)
        if kept is not None:
            model.save_weights(kept)
    weights, calibration = model.get_weights(), corpus.train.take(8)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, change in variants(calibration).items():
            changed = make(corpus)
            changed.set_weights(weights)
            if change is not None:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    change(changed)
                for one in (one for one in said if one.category is UserWarning):
                    Console().print(f"{name}: {one.message}", style="dim")
            files[name] = Path(folder) / f"{len(files)}.tflite"
            tfgptopt.export(changed, files[name], tfgptopt.exporting.TFLite(CONTEXT), verbose=0)
        found = tfgptopt.evaluate(
            {"Keras": model, **files}, corpus.validation.take(16), new_tokens=16, runs=1, verbose=0
        )
        show(found, {name: path.stat().st_size for name, path in files.items()})


def measure_speed(rounds: int = 7) -> None:
    """Prints what a token costs with the chosen experts computed, and with all."""
    shape = {**SHAPE, "num_layers": 4, "num_query_heads": 8, "hidden_dim": 512}
    shape |= {"intermediate_dim": 1024, "num_key_value_heads": 8}
    backbone = keras_hub.models.MixtralBackbone(4096, **shape)
    model = keras_hub.models.MixtralCausalLM(backbone, preprocessor=None)
    tfgptopt.quantize(model, Int8(), verbose=0)
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {}
        for name in ("chosen", "all"):
            if name == "all":
                feedforward._where_chosen = feedforward._with_expert
            path = Path(folder) / f"{name}.tflite"
            tfgptopt.export(model, path, tfgptopt.exporting.TFLite(512), verbose=0)
            runtimes[name] = tfgptopt.TFLiteCausalLM(path, num_threads=1)
            times[name] = {"decode": [], "prefill": []}
        tokens = np.random.default_rng(0).integers(0, 4096, 257).tolist()
        for _ in range(rounds):
            for name, lm in runtimes.items():
                for what, count, new in (("decode", 16, 64), ("prefill", 257, 1)):
                    start = time.process_time()
                    lm.generate(tokens[:count], max_length=count + new, stop=None)
                    times[name][what].append(time.process_time() - start)
    for name, found in times.items():
        decode, prefill = (statistics.median(found[what]) for what in ("decode", "prefill"))
        print(f"{name}: {decode / 64 * 1e3:.2f} ms a token, {prefill * 1e3:.0f} ms for 257 tokens")


def show(found: list[Any], sizes: dict[str, int]) -> None:
    """Prints a table of results."""
    table = Table()
    for column in ("", "MB", "of float32", "perplexity", "change", "KL to Keras"):
        table.add_column(column, justify="left" if not column else "right")
    for one in found[1:]:
        table.add_row(
            one.name,
            f"{sizes[one.name] / 1e6:.2f}",
            f"{sizes[one.name] / sizes['float32']:.3f}",
            f"{one.perplexity:.3f}",
            f"{one.quality.change:+.2%}",
            f"{one.quality.kl:.5f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
