"""Costs of the callbacks per training step, against the plain step.

Steps of the variants take turns within one run, so that a change of the machine's speed hits all.

    python benchmarks/training_overhead.py
    python benchmarks/training_overhead.py --tfmot
    python benchmarks/training_overhead.py --lora --vocabulary 50257 --batch 4 --length 64
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table
from tfgptopt.callbacks import QuantizationAwareTraining

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity
from tfgptopt.pruning.pruner import Pruner
from tfgptopt.pruning.technique import Prune
from tfgptopt.quantization import Int4, Int8


def make_model(layers: int, width: int, vocabulary: int, jit_compile: bool) -> keras.Model:
    """Returns a compiled GPT-2."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary, layers, width // 64, width, 4 * width, dropout=0.0, max_sequence_length=128
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(optimizer=keras.optimizers.AdamW(1e-4), jit_compile=jit_compile)
    return model


def prune(model: keras.Model) -> None:
    """Prunes to one half and holds it."""
    Pruner(model, Prune(ConstantSparsity(0.5, 0))).advance(0)


def rounding_to(spec: Any) -> Callable[[keras.Model], Any]:
    """Returns what makes a model round to a spec."""
    return lambda model: tfgptopt.quantize_aware(model, spec)


def both(model: keras.Model) -> None:
    """Prunes and rounds weights and activations."""
    prune(model)
    tfgptopt.quantize_aware(model, Int8())


def in_fit(model: keras.Model) -> None:
    """Does what the callback does at the start of a `fit`."""
    callback = QuantizationAwareTraining(Int8())
    callback.set_params({})
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_begin(0)


def lora(model: keras.Model) -> None:
    """Freezes the model and adds adapters."""
    model.backbone.enable_lora(8)
    model.compile(optimizer=keras.optimizers.AdamW(1e-4), jit_compile=model.jit_compile)


def lora_in_fit(model: keras.Model) -> None:
    """Adapters, and int8 as the callback trains it."""
    lora(model)
    in_fit(model)


LORA: dict[str, Callable[[keras.Model], Any]] = {
    "plain": lambda model: None,
    "int8 in fit": in_fit,
    "LoRA": lora,
    "LoRA and int8 in fit": lora_in_fit,
}
VARIANTS: dict[str, Callable[[keras.Model], Any]] = {
    "plain": lambda model: None,
    "pruning": prune,
    "int8, weights alone": rounding_to(Int8(activations=None)),
    "int8": rounding_to(Int8()),
    "int4, blocks of 64": rounding_to(Int4(block_size=64)),
    "int4, smallest error": rounding_to(Int4(scale="mse")),
    "pruning and int8": both,
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--lora", action="store_true", help="adapters, frozen weights rounded once")
    parser.add_argument("--jit-compile", action="store_true")
    parser.add_argument("--tfmot", action="store_true", help="compare with tfmot's wrappers")
    arguments = parser.parse_args()
    console = Console(width=80)
    if arguments.tfmot:
        compare_with_tfmot(console, arguments)
        return
    shape = (arguments.batch, arguments.length)
    tokens = np.random.default_rng(0).integers(0, arguments.vocabulary, (shape[0], shape[1] + 1))
    inputs = {
        "token_ids": tokens[:, :-1].astype(np.int32),
        "padding_mask": np.ones(shape, np.int32),
    }
    models = {}
    variants = LORA if arguments.lora else VARIANTS
    for name, dress in variants.items():
        models[name] = make_model(
            arguments.layers, arguments.width, arguments.vocabulary, arguments.jit_compile
        )
        dress(models[name])
    clock = time.process_time if arguments.lora else time.perf_counter
    times = take_turns(models, inputs, tokens[:, 1:], arguments.steps, clock)
    what = "ms of CPU per step" if arguments.lora else "ms per step"
    table = Table("variant", what, "times plain")
    for name, median in times.items():
        base = times["LoRA" if name.startswith("LoRA") else "plain"]
        table.add_row(name, f"{median:.1f}", f"{median / base:.3f}")
    console.print(table)
    if arguments.lora:
        return
    console.print(f"bytes of masks per pruned weight: {mask_bytes(models['pruning']):.2f}")


def mask_bytes(model: keras.Model) -> float:
    """Returns what the masks of a pruned model take."""
    masks = [target.variable.constraint.mask.numpy() for target in select(model)]
    return sum(mask.nbytes for mask in masks) / sum(mask.size for mask in masks)


def dense_stack(layers: Any, width: int, depth: int = 8) -> Any:
    """Returns a compiled stack of Dense layers, of Keras 3 or of tf_keras."""
    model = layers.Sequential(
        [layers.Input((width,)), *(layers.layers.Dense(width) for _ in range(depth))]
    )
    model.compile(optimizer="adam", loss="mse")
    return model


def compare_with_tfmot(console: Console, arguments: argparse.Namespace) -> None:
    """Measures one stack of Dense layers, plain, pruned and rounded, by tfmot and by tfgptopt."""
    import tf_keras
    from tensorflow_model_optimization.python.core.quantization.keras import quantize
    from tensorflow_model_optimization.python.core.sparsity.keras import prune, pruning_wrapper

    width = arguments.width
    rows = arguments.batch * 128
    x = np.random.default_rng(0).normal(0, 1, (rows, width)).astype(np.float32)
    ours, theirs = dense_stack(keras, width), dense_stack(tf_keras, width)
    schedule = ConstantSparsity(0.5, 0, frequency=100)
    wrapped = prune.prune_low_magnitude(dense_stack(tf_keras, width), pruning_schedule=schedule)
    wrapped.compile(optimizer="adam", loss="mse")
    for layer in wrapped.layers:
        if isinstance(layer, pruning_wrapper.PruneLowMagnitude):
            tf_keras.backend.set_value(layer.pruning_step, 0)
    pruned = dense_stack(keras, width)
    Pruner(pruned, Prune(schedule)).advance(0)
    rounded = tfgptopt.quantize_aware(dense_stack(keras, width), Int8())
    annotated = quantize.quantize_model(dense_stack(tf_keras, width))
    annotated.compile(optimizer="adam", loss="mse")
    models = {
        "Keras 3, plain": ours,
        "Keras 3, tfgptopt, pruning": pruned,
        "Keras 3, tfgptopt, int8": rounded,
        "tf_keras, plain": theirs,
        "tf_keras, tfmot, pruning": wrapped,
        "tf_keras, tfmot, int8": annotated,
    }
    times = take_turns(models, x, x, arguments.steps * 4)
    table = Table("8 Dense layers", "ms per step", "times its plain")
    for name, measured in times.items():
        plain = times[name.split(",")[0] + ", plain"]
        table.add_row(name, f"{measured:.1f}", f"{measured / plain:.3f}")
    console.print(table)


def take_turns(
    models: dict[str, Any],
    x: Any,
    y: Any,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Returns the median milliseconds of a training step of each model."""
    for model in models.values():
        for _ in range(2):
            model.train_on_batch(x, y)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(steps):
        for name, model in models.items():
            start = clock()
            model.train_on_batch(x, y)
            times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(measured) for name, measured in times.items()}


if __name__ == "__main__":
    main()
