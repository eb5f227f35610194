"""Time and memory to quantize a model with a vocabulary of 262,144, without training.

    python benchmarks/quantize_gemma.py                  # the command line, int8 without data
    python benchmarks/quantize_gemma.py --gptq           # GPTQ on 16 windows of 512 tokens
    python benchmarks/quantize_gemma.py --auto           # smoothquant, awq and gptq, likewise

The model has the shape of Gemma 3 270M, random weights, and a SentencePiece tokenizer of 262,144
made-up words. `tfgptopt quantize` runs in a process of
its own, loading and writing included. The first run makes the preset and its tokenizer, which is
not counted.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Of Gemma 3 270M, as its own configuration has it.
SHAPE = {
    "vocabulary_size": 262_144,
    "image_size": None,
    "num_layers": 18,
    "num_query_heads": 4,
    "num_key_value_heads": 1,
    "hidden_dim": 640,
    "intermediate_dim": 2048,
    "head_dim": 256,
    "use_sliding_window_attention": True,
    "sliding_window_size": 512,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
}


def make(folder: Path, layers: int) -> None:
    """Writes a preset with random weights."""
    import keras_hub
    from tokenizing import large_proto

    backbone = keras_hub.models.Gemma3Backbone(**{**SHAPE, "num_layers": layers})
    tokenizer = keras_hub.models.Gemma3Tokenizer(large_proto(), has_vision_tokens=False)
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer, sequence_length=512)
    model = keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor)
    model.save_to_preset(str(folder))


def calibration_text(folder: Path) -> Path:
    """Writes text that fills 16 windows of 512 tokens and more, of the standard library."""
    from tfgptopt.data import standard_library

    text, path = "", folder / "text.txt"
    for file in standard_library():
        text += file.path.read_text("utf-8", errors="replace")
        if len(text) > 60_000:
            break
    path.write_text(text, "utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gptq", action="store_true")
    parser.add_argument("--auto", action="store_true")
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"])
    parser.add_argument("--folder", type=Path, help="Where the preset is kept for the next run.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        preset = folder / f"gemma-{arguments.layers}"
        if not preset.exists():
            make(preset, arguments.layers)
        command = [sys.executable, "-m", "tfgptopt.cli.main", "quantize", str(preset)]
        command += [
            str(Path(temporary) / "out.tflite"),
            "--spec",
            "int8",
            "--context-length",
            "2048",
        ]
        if arguments.gptq or arguments.auto:
            command += ["--method", "gptq" if arguments.gptq else "auto"]
            command += ["--calibration", str(calibration_text(folder)), "--windows", "16"]
        else:
            command += ["--method", "rtn"]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{platform.processor() or platform.machine()}: {seconds:.1f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
