"""How far are the estimates of `tfgptopt advise` from measurements?

    python benchmarks/advise.py [--steps]

Two GPT-2s with random weights: sizes of files, tokens per second behind 128 tokens, and a training
step of 8 x 128 tokens, each beside its estimate. The machine is measured before each. Steps run in
a process of their own, whose most memory less that before the model was made is the step's.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import keras_hub
import numpy as np

import tfgptopt
from tfgptopt.evaluation import open_artifact
from tfgptopt.evaluation.advising import Shape, estimate_files, estimate_training
from tfgptopt.evaluation.machine import measure_machine
from tfgptopt.quantization import Int4, Int8
from tfgptopt.training.planning import Training, compile_model

SHAPES = (Shape(6, 384, 8192, heads=6), Shape(12, 768, 50257, heads=12))
SPECS = {"float32": None, "int8": Int8(), "int4": Int4(), "int4:32": Int4(block_size=32)}


def make(shape: Shape) -> keras_hub.models.GPT2CausalLM:
    backbone = keras_hub.models.GPT2Backbone(
        shape.vocabulary, shape.layers, shape.heads, shape.width, shape.neurons,
        max_sequence_length=256,
    )  # fmt: skip
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def memory(name: str) -> int:
    """Returns bytes of this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def step(shape: Shape) -> tuple[float, int]:
    """Returns the seconds of a training step, the least of several, and its bytes."""
    before = memory("VmRSS")
    gpt = make(shape)
    compile_model(gpt, Training(0, 8, 1e-4))
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (8, 129))
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((8, 128), np.int32)}
    gpt.train_on_batch(inputs, tokens[:, 1:])
    times = []
    for _ in range(4):
        began = time.perf_counter()
        gpt.train_on_batch(inputs, tokens[:, 1:])
        times.append(time.perf_counter() - began)
    return min(times), memory("VmHWM") - before


def steps() -> None:
    context = multiprocessing.get_context("spawn")
    for shape in SHAPES:
        machine = measure_machine()
        known = estimate_training(shape, machine)
        with context.Pool(1) as pool:
            took, size = pool.apply(step, (shape,))
        print(f"{shape.parameters / 1e6:.1f} M weights; {machine.flops / 1e12:.2f} TFLOP/s; step: "
              f"at least {known.seconds:.2f} s, {took:.2f} measured; {known.bytes / 1e9:.2f} GB "
              f"estimated, {size / 1e9:.2f} measured", flush=True)  # fmt: skip


def main() -> None:
    for shape in SHAPES:
        machine = measure_machine()
        print(f"{shape.parameters / 1e6:.1f} M weights; {machine.bandwidth / 1e9:.0f} GB/s, "
              f"{machine.flops / 1e12:.2f} TFLOP/s")  # fmt: skip
        gpt = make(shape)
        print(f"  weights: {gpt.count_params() / 1e6:.1f} M")
        for one in estimate_files(shape, machine, 128):
            rounded = make(shape)
            rounded.set_weights(gpt.get_weights())
            if SPECS[one.spec] is not None:
                tfgptopt.quantize(rounded, SPECS[one.spec], verbose=0)
            with tempfile.TemporaryDirectory() as folder:
                path = tfgptopt.export(rounded, Path(folder) / "gpt.tflite", verbose=0)
                size = path.stat().st_size
                decode = open_artifact(path).steps(128)
                times = []
                for _ in range(65):
                    began = time.perf_counter()
                    decode()
                    times.append(time.perf_counter() - began)
            rate = 1 / min(times[1:])
            print(f"  {one.spec}: {one.bytes / 1e6:.1f} MB estimated, {size / 1e6:.1f} measured; "
                  f"at most {one.tokens_per_second:,.0f} tokens/s, {rate:,.0f} measured "
                  f"({rate / one.tokens_per_second:.0%})", flush=True)  # fmt: skip


if __name__ == "__main__":
    if "--steps" not in sys.argv:
        main()
    steps()
