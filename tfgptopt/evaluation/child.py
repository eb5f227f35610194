"""Runs in a process of its own: loads one artifact, makes a token, and says what that took.

It is run as a file, so that a `.tflite` or `.gguf` is measured without TensorFlow beside it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def _first_token(kind: str, path: str) -> None:
    """Loads what lies at a path, and makes its first token."""
    if kind == "file":
        from tfgptopt.generation import TFLiteCausalLM

        lm = TFLiteCausalLM(path)
        lm.generate([1, 2, 3], max_length=4, stop=None)
    elif kind == "llama.cpp":
        from llama_cpp import Llama

        Llama(path, verbose=False).eval([1, 2, 3])
    elif kind == "SavedModel":
        import tensorflow as tf

        ids = tf.constant([[1, 2, 3, 0]])
        tf.saved_model.load(path).generate(ids, tf.constant([[1, 1, 1, 0]]))
    else:
        import keras_hub
        import numpy as np

        model: Any = keras_hub.models.CausalLM.from_preset(path)
        model.compile(sampler="greedy")
        ids, mask = np.asarray([[1, 2, 3, 0]], np.int32), np.asarray([[1, 1, 1, 0]], bool)
        inputs = {"token_ids": ids, "padding_mask": mask}
        model.make_generate_function()(inputs, stop_token_ids=None)


def _peak_rss_bytes() -> int:
    """Returns the most memory of this process; on Linux, `ru_maxrss` counts its parent's too."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:  # noqa: PTH123
            return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.path.pop(0)  # The folder of this file, whose names are not to be imported.
    began = time.perf_counter()
    _first_token(*sys.argv[1:3])
    took = time.perf_counter() - began
    print(json.dumps({"load_seconds": took, "peak_rss_bytes": _peak_rss_bytes()}))
