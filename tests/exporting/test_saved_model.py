import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.quantization import Int4, Int8

# Loads and calls a SavedModel in a process where Keras cannot be imported.
SCRIPT = """
import sys
import numpy as np, tensorflow as tf
for name in [m for m in sys.modules if m.split(".")[0] == "keras"]:
    del sys.modules[name]
sys.modules["keras"] = sys.modules["keras_hub"] = None
folder, tokens, out = sys.argv[1:]
model = tf.saved_model.load(folder)
x = np.load(tokens)
logits = model.serve({"token_ids": x, "padding_mask": np.ones_like(x)}).numpy()
prompt = np.zeros((1, 16), np.int32); prompt[0, :6] = x[0, :6]
mask = (np.arange(16) < 6).astype(np.int32)[None]
made = model.generate(tf.constant(prompt), tf.constant(mask))["token_ids"].numpy()
np.savez(out, logits=logits, made=made)
"""


def test_plain_tensorflow_loads_and_calls_it(gpt, tmp_path):
    tfgptopt.prune(gpt, 0.5)
    tfgptopt.quantize_aware(gpt, Int8())
    gpt.compile(sampler="greedy")
    folder = tfgptopt.export(gpt, tmp_path / "saved")
    x = np.random.default_rng(0).integers(1, 300, (2, 12)).astype(np.int32)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "out.npz"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "x.npy"), str(out)]
    subprocess.run(command, check=True)
    found = np.load(out)
    expected = gpt({"token_ids": x, "padding_mask": np.ones_like(x)})
    np.testing.assert_allclose(found["logits"], expected, atol=1e-3)
    prompt = np.zeros((1, 16), np.int32)
    prompt[0, :6] = x[0, :6]
    inputs = {"token_ids": prompt, "padding_mask": np.arange(16)[np.newaxis] < 6}
    made = gpt.generate(inputs, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found["made"], made)


def test_any_keras_model(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    tfgptopt.prune(model, 0.5)
    folder = tfgptopt.export(model, tmp_path / "dense")
    x = np.ones((5, 4), np.float32)
    loaded = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(loaded.serve(x), model(x), atol=1e-6)


@pytest.mark.parametrize("final", [False, True], ids=["dressed", "finalized"])
@pytest.mark.parametrize("spec", [Int8(), Int4(block_size=32, embedding_bits=4)], ids=str)
def test_weights_are_stored_as_integers(spec, final, tmp_path):
    gpt = make_gpt(context=16)
    floats = tfgptopt.export(gpt, tmp_path / "floats")
    tfgptopt.quantize_aware(gpt, spec)
    if final:
        tfgptopt.finalize(gpt)
    folder = tfgptopt.export(gpt, tmp_path / "integers")
    x = np.random.default_rng(0).integers(1, 300, (2, 12)).astype(np.int32)
    inputs = {"token_ids": x, "padding_mask": np.ones_like(x)}
    loaded = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(loaded.serve(inputs), gpt(inputs), atol=1e-5)

    def bytes_of_weights(saved):
        return sum(path.stat().st_size for path in (saved / "variables").glob("*.data*"))

    rounded = sum(t.size for t in select(gpt, roles=("kernel", "head", "embedding")))
    scales = 4 * 2000  # And what describes the variables.
    saved = bytes_of_weights(floats) - bytes_of_weights(folder)
    assert saved > rounded * (4 - spec.bits / 8) - scales
