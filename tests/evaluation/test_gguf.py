"""llama.cpp's numbers of a file, against those of the Keras model that it was made of."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt

from tfgptopt.evaluation import open_artifact
from tfgptopt.evaluation.quality import compare_quality

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `gguf`)")
pytest.importorskip("gguf", reason="gguf, which writes the test's file, is not installed")


def test_a_gguf_file_is_measured_like_the_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import decode_files

    monkeypatch.setattr(decode_files, "CONTEXT", 64)
    monkeypatch.setattr(decode_files, "VOCABULARY", 300)
    gpt = make_gpt(context=64)
    decode_files.write_gpt2_gguf(gpt, tmp_path / "gpt.gguf")
    sys.modules.pop("decode_files")
    tokens = np.random.default_rng(0).integers(0, 300, (3, 17), np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((3, 16), np.int32)}
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:], np.ones((3, 16), "float32")))
    artifacts = {"Keras": open_artifact(gpt), "gguf": open_artifact(tmp_path / "gpt.gguf")}
    found = compare_quality(artifacts, data.batch(2), "Keras")
    assert found["gguf"].loss == pytest.approx(found["Keras"].loss, rel=1e-3)
    assert found["gguf"].kl < 1e-4 and found["gguf"].agreement > 0.9
    made = [one.generation([5, 9, 7], 8)() for one in artifacts.values()]
    assert made[0] == made[1]
    step = artifacts["gguf"].steps(16)
    step()
    assert artifacts["gguf"].steps(4096) is None
    assert artifacts["gguf"].size().file_bytes == (tmp_path / "gpt.gguf").stat().st_size
