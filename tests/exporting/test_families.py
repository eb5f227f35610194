import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from decoder.families import CONTEXT, FAMILIES, logits, make, prompt

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.generation import caches
from tfgptopt.quantization import Int4, Int8

# KerasHub 0.32's cache of GPT-NeoX turns each new query as if it stood at position 0, and that of
# Qwen2 with a sliding window raises.
_BROKEN_CACHE = ("GPTNeoX", "Qwen2")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Makes caches grow several times within the short context."""
    monkeypatch.setattr(caches, "_STEP", 16)


def file_logits(lm, tokens):
    return lm._engine.score(lm._engine.new_cache(), tokens)


def keras_generate(model, tokens):
    """Greedy generation by KerasHub, up to the whole context."""
    ids, mask = np.zeros((1, CONTEXT), np.int32), np.zeros((1, CONTEXT), np.int32)
    ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
    # What `generate` calls; `generate` itself fails for a Gemma without preprocessor.
    inputs = {"token_ids": tf.constant(ids), "padding_mask": tf.constant(mask, tf.bool)}
    found = model.make_generate_function()(inputs, stop_token_ids=None)
    return found["token_ids"][0].numpy().tolist()


def slow_generate(model, tokens):
    """Greedy generation by definition: the whole text again for each token."""

    @tf.function
    def following(ids, at):
        inputs = {"token_ids": ids[tf.newaxis], "padding_mask": tf.ones_like(ids[tf.newaxis])}
        return tf.argmax(model(inputs)[0, at])

    tokens = list(tokens)
    while len(tokens) < CONTEXT:
        padded = tf.constant(tokens + [0] * (CONTEXT - len(tokens)))
        tokens.append(int(following(padded, tf.constant(len(tokens) - 1))))
    return tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_file_is_the_keras_model(name, tmp_path):
    model = make(name)
    model.compile(sampler="greedy")
    lm = tfgptopt.TFLiteCausalLM(
        tfgptopt.export(model, tmp_path / "gpt.tflite", TFLite(CONTEXT, batch_sizes=(2,)))
    )
    generate = slow_generate if name in _BROKEN_CACHE else keras_generate
    texts = {}
    for length in (1, 31, 86):
        expected = texts[length] = generate(model, prompt(length))
        assert lm.generate(prompt(length), max_length=CONTEXT, stop=None) == expected
        np.testing.assert_allclose(
            file_logits(lm, expected), logits(model, expected), atol=1e-4, rtol=0
        )
    assert lm.generate([prompt(length) for length in texts], stop=None) == list(texts.values())


_EYES = {
    "image_size": 16,
    "patch_size": 4,
    "num_heads": 2,
    "hidden_dim": 8,
    "num_layers": 1,
    "intermediate_dim": 16,
    "output_dim": 32,
    "pool_size": 2,
}


@pytest.mark.parametrize(
    "name, eyes", [("Gemma 3", _EYES), ("Gemma 4", {**_EYES, "head_dim": 4})], ids=lambda x: str(x)
)
def test_the_file_of_a_model_that_sees_is_that_of_its_text_part(name, eyes, tmp_path):
    encoder = getattr(keras_hub.models, f"{FAMILIES[name][0]}VisionEncoder")(**eyes)
    seeing, text = make(name, vision_encoder=encoder), make(name)
    own = {weight.path: weight for weight in text.weights}
    for weight in seeing.weights:
        if weight.path in own:
            own.pop(weight.path).assign(weight)
    assert not own
    with pytest.warns(UserWarning, match="without its vision_encoder: it reads text only"):
        path = tfgptopt.export(seeing, tmp_path / "gpt.tflite", TFLite(context_length=CONTEXT))
    tokens = prompt(40)
    found = file_logits(tfgptopt.TFLiteCausalLM(path), tokens)
    np.testing.assert_allclose(found, logits(text, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", [Int8(), Int4()], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_integer_file_computes_as_the_dressed_model(name, spec, tmp_path):
    model = make(name)
    tfgptopt.quantize_aware(model, spec)
    lm = tfgptopt.TFLiteCausalLM(
        tfgptopt.export(model, tmp_path / "gpt.tflite", TFLite(context_length=CONTEXT))
    )
    largest = []
    for seed in range(7):
        tokens = prompt(40, seed)
        expected = logits(model, tokens)
        difference = np.abs(file_logits(lm, tokens) - expected)
        largest.append(difference.max())
        # An activation at the edge between two integers may fall either way.
        assert difference.max() < 0.15 * expected.std()
    assert np.median(largest) < 2e-2
    assert np.min(largest) < 1e-4


def test_phi3_takes_the_long_factors_for_a_long_context(tmp_path):
    model = make("Phi3", pretraining_sequence_length=40)
    tokens = prompt(CONTEXT)
    for context, length in ((40, 40), (CONTEXT, CONTEXT)):
        path = tfgptopt.export(
            model, tmp_path / f"{context}.tflite", TFLite(context_length=context)
        )
        found = file_logits(tfgptopt.TFLiteCausalLM(path), tokens[:length])
        np.testing.assert_allclose(found, logits(model, tokens[:length]), atol=1e-4)


def test_a_context_is_needed_only_where_positions_are_learned(tmp_path):
    free = tfgptopt.TFLiteCausalLM(tfgptopt.export(make("Llama"), tmp_path / "llama.tflite"))
    assert free.context_length == 1024
    with pytest.raises(ValueError, match=f"from 2 to {CONTEXT}"):
        tfgptopt.export(make("OPT"), tmp_path / "opt.tflite", TFLite(context_length=CONTEXT + 1))
    with pytest.raises(ValueError, match="an int >= 2"):
        tfgptopt.export(make("Llama"), tmp_path / "gpt.tflite", TFLite(context_length=0))
