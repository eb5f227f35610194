import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf

import tfgptopt

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
    from tfgptopt.quantization import Int8

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
