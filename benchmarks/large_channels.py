"""What rounding costs a Gemma 3 with large channels, with and without rotation.

A small Gemma 3 is trained on the demo's text. Three channels of its residual stream are then made
200 times as large: in the token table and behind every branch; norms in front of products undo it.
Since a norm divides by the size of all channels, the model is trained on until it has recovered.
Three other channels of what norms give are made 200 times as large as well, which the products
behind undo exactly. Perplexity is that of held-out text; rises are against the same float model.

    python benchmarks/large_channels.py
    python benchmarks/large_channels.py --gpt2   # a GPT-2 as it was trained, nothing enlarged
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table
from tfgptopt.callbacks import QuantizationAwareTraining

import tfgptopt
from tfgptopt.data import Corpus, load_corpus, tokens_as_input
from tfgptopt.quantization import Int4, Int8, rotate

FACTOR, IN_STREAM, BEHIND_NORMS = 200.0, [5, 40, 77], [9, 33, 100]
VALIDATION = 24  # Batches of 16 windows of 128 tokens.


def make(vocabulary: int, gpt2: bool) -> Any:
    """Returns a small Gemma 3, or a GPT-2."""
    if gpt2:
        inner = keras_hub.models.GPT2Backbone(
            vocabulary, 4, 4, 128, 512, dropout=0.0, max_sequence_length=128
        )
        return keras_hub.models.GPT2CausalLM(inner, preprocessor=None)
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=vocabulary, image_size=None, num_layers=4, num_query_heads=4,
        num_key_value_heads=1, hidden_dim=128, intermediate_dim=512, head_dim=32,
        use_sliding_window_attention=True, sliding_window_size=64, use_post_ffw_norm=True,
        use_post_attention_norm=True,
    )  # fmt: skip
    return keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=None)


def scale(norm: Any, channels: list[int], factor: float) -> None:
    """Multiplies what a norm gives in some channels."""
    gain = 1.0 + norm.scale.numpy()
    gain[channels] *= factor
    norm.scale.assign(gain - 1.0)


def enlarge_stream(model: Any) -> None:
    """Makes channels of the stream large, and divides by that in the norms that read it."""
    table = model.backbone.token_embedding.embeddings
    values = table.numpy()
    values[:, IN_STREAM] *= FACTOR
    table.assign(values)
    for block in model.backbone.transformer_layers:
        for norm in (block.post_attention_norm, block.post_ffw_norm):
            scale(norm, IN_STREAM, FACTOR)
        for norm in (block.pre_attention_norm, block.pre_ffw_norm):
            scale(norm, IN_STREAM, 1.0 / FACTOR)
    # The head reads the table, whose columns are large already.
    scale(model.backbone.layer_norm, IN_STREAM, FACTOR**-2)


def enlarge_inputs(model: Any) -> None:
    """Makes inputs of products large, and divides the weights that read them."""
    for block in model.backbone.transformer_layers:
        inner = block.attention
        for norm, readers in (
            (block.pre_attention_norm, (inner.query_dense, inner.key_dense, inner.value_dense)),
            (block.pre_ffw_norm, (block.gating_ffw, block.gating_ffw_2)),
        ):
            scale(norm, BEHIND_NORMS, FACTOR)
            for reader in readers:
                kernel = reader.kernel.numpy()
                # Kernels of attention are (heads, width, head_dim).
                rows = kernel[:, BEHIND_NORMS] if kernel.ndim == 3 else kernel[BEHIND_NORMS]
                rows /= FACTOR
                kernel[(slice(None), BEHIND_NORMS) if kernel.ndim == 3 else BEHIND_NORMS] = rows
                reader.kernel.assign(kernel)


def train(model: Any, corpus: Corpus, steps: int, rate: float) -> None:
    """Trains a model."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.AdamW(schedule, global_clipnorm=1.0), sampler="greedy")
    with tokens_as_input(model):
        model.fit(corpus.train.repeat(), steps_per_epoch=steps, verbose=2)


def teach(model: Any, teacher: Any, corpus: Corpus, windows: Any, steps: int) -> None:
    """Does what the recipe `int4` does: rotation, GPTQ, then the float model's predictions."""
    rotate(model)
    distiller = tfgptopt.Distiller(model, teacher)
    schedule = keras.optimizers.schedules.CosineDecay(2e-4, steps)
    distiller.compile(keras.optimizers.Adam(schedule, global_clipnorm=1.0))
    spec = Int4(block_size=32, scale="learned")
    rounding = QuantizationAwareTraining(spec, method="gptq", data=windows)
    distiller.fit(corpus.train.repeat(), steps_per_epoch=steps, verbose=0, callbacks=[rounding])


def loss_of(model: Any, corpus: Corpus) -> float:
    """Returns the loss on held-out text."""
    with tokens_as_input(model):
        found = model.evaluate(corpus.validation.take(VALIDATION), verbose=0, return_dict=True)
    return float(found["loss"])


def main() -> None:
    """Trains, rounds and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="steps, and half as many behind")
    parser.add_argument("--taught", type=int, default=200, help="steps with the float model")
    parser.add_argument("--gpt2", action="store_true")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    corpus = load_corpus(vocabulary_size=2048, sequence_length=128, batch_size=16)
    vocabulary = corpus.tokenizer.vocabulary_size()
    model = make(vocabulary, arguments.gpt2)
    train(model, corpus, arguments.steps, 1e-3 if arguments.gpt2 else 3e-3)
    if not arguments.gpt2:
        enlarge_stream(model)
        train(model, corpus, arguments.steps // 2, 1e-3)
        enlarge_inputs(model)
    weights, floats = model.get_weights(), loss_of(model, corpus)
    name = "GPT-2 of 4 layers" if arguments.gpt2 else "Gemma 3 of 4 layers with large channels"
    table = Table(title=f"{name}, perplexity {np.exp(floats):.2f}")
    table.add_column("how")
    table.add_column("rise", justify="right")
    windows = corpus.train.take(8)

    def row(name: str, change: Callable[[Any], None]) -> None:
        copy = make(vocabulary, arguments.gpt2)
        copy.set_weights(weights)
        copy.compile(sampler="greedy")
        with tokens_as_input(copy):
            change(copy)
        rise = np.exp(loss_of(copy, corpus) - floats) - 1
        print(f"{name}: {rise:+.2%}", flush=True)
        table.add_row(name, f"{rise:+.2%}")

    for spec, method, data in (
        (Int8(), "rtn", None), (Int8(), "smoothquant", windows), (Int8(), "rotation", None),
        (Int8(), "auto", None), (Int8(), "auto", windows), (Int4(block_size=32), "rtn", None),
        (Int4(block_size=32), "gptq", windows), (Int4(block_size=32), "auto", windows),
    ):  # fmt: skip
        name = f"{spec}, {method}{', data' if data is not None else ''}"
        row(name, partial(tfgptopt.quantize, spec=spec, method=method, data=data))
    if arguments.gpt2:
        row(
            f"{Int4(block_size=32)}, rotation, gptq, {arguments.taught} steps of distillation",
            lambda copy: teach(copy, model, corpus, windows, arguments.taught),
        )
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
