"""Attributions: sums, files against their models, what a masked token does by hand."""

import itertools
import math
import sys

import keras_hub
import numpy as np
import pytest
from conftest import make_gpt
from evaluation.test_artifacts import logs_of

import tfgptopt
from tfgptopt.evaluation import open_artifact
from tfgptopt.evaluation.explain import explain, rank_correlation
from tfgptopt.evaluation.integrating import integrate
from tfgptopt.quantization import Int4

PROMPT = [5, 9, 7, 200, 31]


@pytest.fixture(scope="module")
def gpt():
    model = make_gpt()
    for weight in model.weights:  # So that tokens matter.
        if "embedding" in weight.path:
            weight.assign(8 * weight.numpy())
    return model


def test_occlusion_is_what_a_token_in_its_place_does(gpt, tmp_path):
    found = explain(open_artifact(gpt), PROMPT, masked_id=3)
    exact = logs_of(gpt, PROMPT)[-1]
    assert found.target_id == exact.argmax() and found.score == pytest.approx(exact.max(), abs=1e-5)
    for i in range(len(PROMPT)):
        other = [*PROMPT[:i], 3, *PROMPT[i + 1 :]]
        fall = exact.max() - logs_of(gpt, other)[-1][found.target_id]
        assert found.values[i] == pytest.approx(fall, abs=1e-4)
    assert max(map(abs, found.values)) > 0.01
    file = tfgptopt.export(gpt, tmp_path / "gpt.tflite")
    of_file = explain(open_artifact(file), PROMPT, masked_id=3)
    np.testing.assert_allclose(of_file.values, found.values, atol=1e-4)
    assert rank_correlation(of_file.values, found.values) == pytest.approx(1)


def test_integrals_are_those_of_the_formula():
    """Of f(x) = w.x / sqrt(mean(x^2) + e), a norm and a product, from zeros: it turns fast."""
    generator, epsilon, size = np.random.default_rng(0), 1e-5, 6
    x, w = generator.normal(size=(2, size))
    mean, product = (x * x).mean(), w @ x

    def ask(places):
        roots = np.sqrt(places**2 * mean + epsilon)[:, None]
        slopes = w / roots - (places**2)[:, None] * product * x / size / roots**3
        return places * product / roots[:, 0], slopes * x

    found, end, begin = integrate(ask, 2)
    root = np.sqrt(mean)
    first = np.arcsinh(root / np.sqrt(epsilon)) / root
    second = (first - 1 / np.sqrt(mean + epsilon)) / mean
    np.testing.assert_allclose(found, x * (w * first - product * x / size * second), atol=1e-4)
    assert begin == 0 and found.sum() == pytest.approx(end, abs=2e-4)


def test_integrated_gradients_sum_to_the_difference(gpt):
    before = gpt.get_weights()
    found = explain(open_artifact(gpt), PROMPT, "integrated_gradients", masked_id=3)
    assert sum(found.values) == pytest.approx(found.score - found.baseline, abs=1e-4)
    assert found.score == pytest.approx(logs_of(gpt, PROMPT)[-1].max(), abs=1e-4)
    untold = logs_of(gpt, [3] * len(PROMPT))[-1][found.target_id]
    assert found.baseline == pytest.approx(untold, abs=1e-4)
    again = explain(open_artifact(gpt), PROMPT)  # The layer looks tokens up again.
    assert again.score == pytest.approx(found.score, abs=1e-4)
    for old, new in zip(before, gpt.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_integrated_gradients_of_models_without_positions():
    backbone = keras_hub.models.LlamaBackbone(300, 2, 4, 32, 64, 2)
    llama = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    for weight in llama.weights:
        weight.assign(weight.numpy() * (6 if "embedding" in weight.path else 1))
    found = explain(open_artifact(llama), PROMPT, "integrated_gradients", masked_id=3)
    assert abs(found.score - found.baseline) > 0.05
    assert sum(found.values) == pytest.approx(found.score - found.baseline, abs=1e-3)


def test_shap_sums_to_the_difference_and_is_shapley(gpt):
    pytest.importorskip("shap", reason="SHAP is not installed (extra `explain`)")
    prompt = PROMPT[:4]
    found = explain(open_artifact(gpt), prompt, "shap", masked_id=3, samples=400)
    assert sum(found.values) == pytest.approx(found.score - found.baseline, abs=1e-3)

    def value(told):
        ids = [token if i in told else 3 for i, token in enumerate(prompt)]
        return logs_of(gpt, ids)[-1][found.target_id]

    worth = {s: value(s) for r in range(5) for s in itertools.combinations(range(4), r)}
    for i in range(4):
        expected = 0.0
        for told, before in worth.items():
            if i not in told:
                share = math.factorial(len(told)) * math.factorial(3 - len(told)) / 24
                expected += share * (worth[tuple(sorted((*told, i)))] - before)
        assert found.values[i] == pytest.approx(expected, abs=0.1)


def test_lime_finds_the_token_that_matters(gpt):
    pytest.importorskip("lime", reason="LIME is not installed (extra `explain`)")
    occluded = explain(open_artifact(gpt), PROMPT, masked_id=3)
    found = explain(open_artifact(gpt), PROMPT, "lime", masked_id=3, samples=300)
    assert np.argmax(np.abs(found.values)) == np.argmax(np.abs(occluded.values))


def test_compression_is_compared_by_ranks(gpt, corpus, tmp_path):
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # By hand, with a tie: ranks 1.5, 1.5, 3 and 1, 2, 3.
    expected = np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1]
    assert rank_correlation([4, 4, 9], [1, 2, 3]) == pytest.approx(expected)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    coarse = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    coarse.set_weights(model.get_weights())
    tfgptopt.quantize(coarse, Int4())
    whole, rounded = tfgptopt.evaluate(
        {"whole": model, "rounded": coarse}, corpus.validation.take(1), new_tokens=1, runs=1,
        prompts=["import os"], explanation="occlusion",
    )  # fmt: skip
    one, other = (result.attributions["import os"] for result in (whole, rounded))
    assert one.target_id == other.target_id  # The reference's next token, of both.
    assert "".join(other.tokens).endswith("import os") and one.values != other.values
    ranks = [np.argsort(np.argsort(found.values)) for found in (one, other)]
    expected = np.corrcoef(*ranks)[0, 1]
    assert rank_correlation(one.values, other.values) == pytest.approx(expected)


def test_bad_input(gpt, tmp_path, monkeypatch):
    artifact = open_artifact(gpt)
    with pytest.raises(ValueError, match="`method` must be one of"):
        explain(artifact, PROMPT, "tea leaves")
    with pytest.raises(ValueError, match=r"2 tokens at least.*Received: 1"):
        explain(artifact, [4])
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        explain(artifact, "text")
    file = open_artifact(tfgptopt.export(gpt, tmp_path / "gpt.tflite"))
    with pytest.raises(ValueError, match=r"need a Keras model.*Received: file"):
        explain(file, PROMPT, "integrated_gradients")
    for name in ("shap", "lime"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.lime_text", None)
        with pytest.raises(ImportError, match=r"tfgptopt\[explain\]"):
            explain(artifact, PROMPT, name)
    with pytest.raises(ValueError, match="one length"):
        rank_correlation([1, 2], [1])
