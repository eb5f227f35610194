import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt
from data.chatty import gemma_tokenizer

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


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model of few tokens in int8, and its folder loaded by TensorFlow."""
    model = make_gpt(context=24, layers=1)
    tfgptopt.quantize(model, Int8())
    folder = tfgptopt.export(model, tmp_path_factory.mktemp("saved") / "gpt")
    return model, tf.saved_model.load(str(folder))


def padded(lengths, length=24, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 300, (len(lengths), length), np.int32)
    mask = (np.arange(length) < np.asarray(lengths)[:, None]).astype(np.int32)
    return tokens * mask, mask


def test_prefill_and_decode_are_what_generate_does(loaded):
    _, saved = loaded
    tokens, mask = padded([5, 5])
    expected = saved.generate(tokens, mask)["token_ids"].numpy()
    cache = saved.prefill(tokens)["cache"]
    for at in range(5, 24):
        step = saved.decode(tokens[:, at - 1], cache, tf.constant(at - 1))
        tokens[:, at], cache = step["logits"].numpy().argmax(-1), step["cache"]
    np.testing.assert_array_equal(tokens, expected)
    signatures = saved.signatures
    assert {"serving_default", "generate", "sample", "prefill", "decode"} <= set(signatures)


@pytest.mark.parametrize("name", ["generate", "sample"])
def test_it_compiles_with_xla_for_any_batch(name, loaded):
    model, saved = loaded
    model.compile(sampler="greedy")
    settings = () if name == "generate" else (3, 0.01, 1, 1.0)
    rest = [tf.constant(value) for value in settings]
    compiled = tf.function(getattr(saved, name), jit_compile=True)
    for lengths in ([3], [4, 9, 2]):
        tokens, mask = padded(lengths)
        expected = model.generate(
            {"token_ids": tokens, "padding_mask": mask.astype(bool)}, stop_token_ids=None
        )["token_ids"]  # fmt: skip
        found = compiled(tf.constant(tokens), tf.constant(mask), *rest)["token_ids"]
        np.testing.assert_array_equal(found, expected)


def test_drawn_tokens_have_the_distribution_that_was_asked_for(loaded):
    _, saved = loaded
    rows, temperature, k = 3000, 2.0, 4
    tokens, mask = (np.repeat(x[:, :6], rows, axis=0) for x in padded([5]))

    def drawn(seed, top_k, top_p):
        rest = (tf.constant(x) for x in (seed, temperature, top_k, top_p))
        return saved.sample(tokens, mask, *rest)["token_ids"].numpy()[:, 5]

    x = {"token_ids": tokens[:1], "padding_mask": np.ones_like(mask[:1])}
    logits = saved.serve(x).numpy()[0, 4].astype(np.float64) / temperature
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)
    found = drawn(1, k, 1.0)
    assert set(found) == set(best[:k])
    expected = shares[best[:k]] / shares[best[:k]].sum() * rows
    counts = np.array([(found == token).sum() for token in best[:k]])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # Chance of 0.001 at 3 degrees.
    kept = best[: 1 + int((np.cumsum(shares[best]) < 0.1).sum())]
    assert set(drawn(1, 0, 0.1)) == set(kept)
    assert len(set(drawn(1, 0, 1.0))) > 50
    np.testing.assert_array_equal(found, drawn(1, k, 1.0))
    assert (found != drawn(2, k, 1.0)).any()


TEXT_SCRIPT = """
import sys
import tensorflow as tf, tensorflow_text
sys.modules["keras"] = sys.modules["keras_hub"] = None
model = tf.saved_model.load(sys.argv[1])
made = model.generate_text(tf.constant(["What is 2 plus 2?", "The"]), tf.constant(24))["texts"]
tf.io.write_file(sys.argv[2], tf.io.serialize_tensor(made))
"""


def test_texts_in_and_out_by_tensorflow_text_alone(tmp_path):
    backbone = keras_hub.models.GemmaBackbone(
        gemma_tokenizer().vocabulary_size(), 1, 2, 1, 16, 32, 8, dropout=0.0
    )
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(gemma_tokenizer(), sequence_length=24)
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor)
    model.compile(sampler="greedy")
    folder = tfgptopt.export(model, tmp_path / "saved")
    out = tmp_path / "texts"
    subprocess.run([sys.executable, "-c", TEXT_SCRIPT, str(folder), str(out)], check=True)
    found = tf.io.parse_tensor(tf.io.read_file(str(out)), tf.string).numpy()
    expected = model.generate(["What is 2 plus 2?", "The"], max_length=24)
    assert [text.decode() for text in found] == expected


def test_any_keras_model(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    tfgptopt.prune(model, 0.5)
    folder = tfgptopt.export(model, tmp_path / "dense")
    x = np.ones((5, 4), np.float32)
    loaded = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(loaded.serve(x), model(x), atol=1e-6)


def bytes_of_weights(saved):
    return sum(path.stat().st_size for path in (saved / "variables").glob("*.data*"))


@pytest.fixture(scope="module")
def float_bytes(tmp_path_factory):
    floats = make_gpt(context=16, layers=1)
    return bytes_of_weights(tfgptopt.export(floats, tmp_path_factory.mktemp("saved") / "floats"))


@pytest.mark.parametrize(
    ("spec", "final"),
    [(Int8(activation_blocks=2), False), (Int4(block_size=32, embedding_bits=4), True)],
    ids=str,
)
def test_weights_are_stored_as_integers(spec, final, float_bytes, tmp_path):
    gpt = make_gpt(context=16, layers=1)
    tfgptopt.quantize_aware(gpt, spec)
    if final:
        tfgptopt.finalize(gpt)
    folder = tfgptopt.export(gpt, tmp_path / "integers")
    x = np.random.default_rng(0).integers(1, 300, (2, 12)).astype(np.int32)
    inputs = {"token_ids": x, "padding_mask": np.ones_like(x)}
    loaded = tf.saved_model.load(str(folder))
    np.testing.assert_allclose(loaded.serve(inputs), gpt(inputs), atol=1e-5)
    rounded = sum(t.size for t in select(gpt, roles=("kernel", "head", "embedding")))
    scales = 4 * 2000  # And what describes the variables.
    saved = float_bytes - bytes_of_weights(folder)
    assert saved > rounded * (4 - spec.bits / 8) - scales
