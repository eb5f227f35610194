"""How much faster a file decodes when its model was shrunk.

python benchmarks/shrinking.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import tfgptopt
from tfgptopt.evaluation.speed import compare_speed
from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.quantization import Int8


def make(layers: int, width: int) -> Any:
    """Returns a GPT-2 with random weights."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=4096,
        num_layers=layers,
        num_heads=width // 64,
        hidden_dim=width,
        intermediate_dim=4 * width,
        max_sequence_length=256,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=9)
    settings = parser.parse_args()
    model = make(settings.layers, settings.width)
    tokens = np.random.default_rng(0).integers(0, 4096, (4, 64), np.int32)
    fewer = settings.layers * 2 // 3
    variants = {
        f"{settings.layers} layers": model,
        f"{fewer} layers": tfgptopt.shrink(model, depth=fewer, calibration=tokens),
        "half of the neurons": tfgptopt.shrink(model, feedforward=0.5, calibration=tokens),
        "two thirds of the width": tfgptopt.shrink(model, width=2 / 3, calibration=tokens),
    }
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for bits in ("float32", "int8"):
            for i, (name, variant) in enumerate(variants.items()):
                if bits == "int8":
                    tfgptopt.quantize_aware(variant, Int8())
                path = tfgptopt.export(variant, Path(folder) / f"{bits}-{i}.tflite")
                files[f"{name}, {bits}"] = TFLiteCausalLM(path)
        speeds = compare_speed(files, tokens[0, :16].tolist(), settings.new_tokens, settings.runs)
    table = Table("", "weights", "tokens/s", "times")
    for name, speed in speeds.items():
        variant, bits = name.rsplit(", ", 1)
        base = speeds[f"{settings.layers} layers, {bits}"].tokens_per_second
        count = f"{variants[variant].count_params() / 1e6:.1f} M"
        rate = speed.tokens_per_second
        table.add_row(name, count, f"{rate:,.0f}", f"{rate / base:.2f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
