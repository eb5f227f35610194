"""Mixtures of experts with a reader: the file computes them with integers."""

from collections import Counter

import keras
import keras_hub
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from decoder.families import VOCABULARY, logits, prompt, randomize

import tfgptopt
from tfgptopt.decoder import read_decoder
from tfgptopt.exporting import TFLite
from tfgptopt.quantization import Int4, Int8

# 64 tokens past the longest window.
CONTEXT = 8 + 9 + 64
GROUPED = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "num_experts": 5,
}
# Long enough that frequencies of all kinds, stretched, mixed and plain, make a difference.
_YARN = {"rope_max_wavelength": 300, "rope_scaling_factor": 4.0}
_QWEN = {**GROUPED, "moe_intermediate_dim": 24}
MIXTURES = {
    "Mixtral": {**GROUPED, "top_k": 2, "sliding_window": 9},
    "QwenMoe": {
        **_QWEN,
        "top_k": 2,
        "shared_expert_intermediate_dim": 40,
        "tie_word_embeddings": True,
    },
    "Qwen3Moe": {
        **_QWEN,
        "top_k": 3,
        "norm_top_k_prob": True,
        "head_dim": 16,
        "mlp_only_layers": [0],
        "sliding_window_size": 9,
    },
    # Its window does not count the token itself.
    "GptOss": {**GROUPED, "top_k": 2, "head_dim": 16, "sliding_window": 8, **_YARN},
}


def make(name):
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**MIXTURES[name])
    model = getattr(keras_hub.models, f"{name}CausalLM")(backbone, preprocessor=None)
    randomize(model)
    return model


def export(model, path):
    path = tfgptopt.export(model, path, TFLite(context_length=CONTEXT))
    return tfgptopt.TFLiteCausalLM(path), path.stat().st_size


def file_logits(lm, tokens):
    return lm._engine.score(lm._engine.new_cache(), tokens)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_file_of_a_mixture_computes_as_keras(name, tmp_path):
    model = make(name)
    lm, size = export(model, tmp_path / "float.tflite")
    tokens = lm.generate(prompt(8), max_length=CONTEXT, stop=None)
    plain = logits(model, tokens)
    # What Keras finds likeliest behind each beginning: its own greedy tokens, then.
    assert tokens[8:] == plain[7:-1].argmax(axis=1).tolist()
    np.testing.assert_allclose(file_logits(lm, tokens), plain, atol=1e-4, rtol=0)
    floats = 4 * sum(matrix.values.size for matrix in read_decoder(model).matrices())
    for spec in (Int8(), Int4()):
        dressed = make(name)
        tfgptopt.quantize_aware(dressed, spec)
        lm, smaller = export(dressed, tmp_path / f"{spec.bits}.tflite")
        expected = logits(dressed, tokens)
        difference = np.abs(file_logits(lm, tokens) - expected)
        assert np.median(difference) < 1e-3 < np.abs(expected - plain).mean()
        # Besides the integers, rows as short as these have scales that matter.
        assert size - smaller > 0.6 * floats


def test_eight_experts_at_int8_take_a_quarter_and_say_the_same(tmp_path):
    settings = {**MIXTURES["Mixtral"], "num_experts": 8, "num_layers": 1}
    settings |= {"hidden_dim": 256, "intermediate_dim": 256}
    backbone = keras_hub.models.MixtralBackbone(**settings)
    model = keras_hub.models.MixtralCausalLM(backbone, preprocessor=None)
    tokens = prompt(CONTEXT)
    _, size = export(model, tmp_path / "float.tflite")
    exact = keras.ops.log_softmax(logits(model, tokens)).numpy()
    tfgptopt.quantize(model, Int8(), verbose=0)
    lm, smaller = export(model, tmp_path / "int8.tflite")
    assert smaller <= 0.28 * size
    found = keras.ops.log_softmax(file_logits(lm, tokens)).numpy()
    kl, of_guess = (
        np.sum(np.exp(exact) * (exact - one), axis=1).mean()
        for one in (found, np.full_like(exact, -np.log(VOCABULARY)))
    )
    assert 0 < kl < 5e-3 * of_guess, (kl, of_guess)


def operators_by_signature(path):
    """Counts the operators of each signature, without those in branches."""
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    return {
        one.signatureKey.decode(): Counter(
            file.operatorCodes[operator.opcodeIndex].builtinCode
            for operator in file.subgraphs[one.subgraphIndex].operators
        )
        for one in file.signatureDefs
    }


def test_one_token_computes_only_the_experts_that_it_is_sent_to(tmp_path):
    model, operator = make("Mixtral"), schema.BuiltinOperator
    tfgptopt.quantize(model, Int8(), verbose=0)
    lm, _ = export(model, tmp_path / "chosen.tflite")
    found = operators_by_signature(tmp_path / "chosen.tflite")
    layers, experts = GROUPED["num_layers"], GROUPED["num_experts"]
    assert found["decode"][operator.IF] == layers * experts
    # Queries with keys and values, outputs and router of each layer, and the head.
    assert found["decode"][operator.FULLY_CONNECTED] == 3 * layers + 1
    assert all(not count[operator.IF] for name, count in found.items() if name != "decode")
    tokens = prompt(12)
    one_by_one, cache = [], lm._engine.new_cache()
    for token in tokens:
        one_by_one.append(lm._engine.decode(cache, token).copy())
    np.testing.assert_allclose(one_by_one, file_logits(lm, tokens), atol=1e-4)


def test_a_spec_says_which_experts_read_a_token():
    assert "2 of 5 experts, gated silu of 48" in str(read_decoder(make("Mixtral")))
    text = str(read_decoder(make("GptOss")))
    assert "gated sigmoid of 1.702 x up to 7 of 48" in text and "window 9, sinks" in text
    text = str(read_decoder(make("QwenMoe")))
    assert "2 of 5 experts, gated silu of 24, besides gated silu of 40" in text
    text = str(read_decoder(make("Qwen3Moe")))
    assert "feed-forward: gated silu of 48" in text
    assert "3 of 5 experts, gated silu of 24" in text
