import gzip
import math

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt

import tfgptopt
from tfgptopt.data import tokens_as_input
from tfgptopt.evaluation.bigram import bigram_loss
from tfgptopt.evaluation.loss import keras_loss, tflite_loss
from tfgptopt.evaluation.size import gzip_size, keras_size, tflite_size


def dataset(ids, labels, weights):
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return tf.data.Dataset.from_tensor_slices((inputs, labels, weights)).batch(2)


def test_bigram_loss_is_the_formula_by_hand():
    ids = np.asarray([[0, 1, 0, 1, 0]], np.int32)
    labels = np.asarray([[1, 0, 1, 0, 2]], np.int32)
    data = dataset(ids, labels, np.ones_like(ids, np.float32))
    unigram = (np.asarray([2, 2, 1]) + 1) / 8
    losses = []
    for strength in (1, 3, 10, 30, 100, 300):
        pairs = {(0, 1): 2, (1, 0): 2, (0, 2): 1}
        firsts = {0: 3, 1: 2}
        terms = [
            -math.log((pairs[a, b] + strength * unigram[b]) / (firsts[a] + strength))
            for a, b in zip(ids[0], labels[0], strict=True)
        ]
        losses.append(np.mean(terms))
    assert bigram_loss(data, data, 3) == pytest.approx(min(losses))


def test_losses_count_only_tokens_with_weight(gpt, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 300, (3, 9), np.int32)
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    # Padding, and prompts before and between answers.
    weights = np.ones((3, 8), np.float32)
    weights[2, 4:] = weights[1, :3] = weights[2, 1:3] = 0
    logits = np.asarray(gpt({"token_ids": ids, "padding_mask": np.ones_like(ids)}), np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = -np.take_along_axis(logs, labels[..., None], -1)[..., 0]
    expected = (picked * weights).sum() / weights.sum()
    data = dataset(ids, labels, weights)
    assert keras_loss(gpt, data) == pytest.approx(expected, rel=1e-5)
    lm = tfgptopt.TFLiteCausalLM(tfgptopt.export(gpt, tmp_path / "gpt.tflite"))
    assert tflite_loss(lm, data) == pytest.approx(expected, rel=1e-5)


def test_models_and_files_are_measured_as_themselves(trained, corpus, tmp_path):
    path = tfgptopt.export(trained, tmp_path / "gpt.tflite")
    results = tfgptopt.evaluate(
        {"Keras": trained, "TFLite": path}, corpus.validation, new_tokens=8, runs=1
    )
    assert [result.name for result in results] == ["Keras", "TFLite"]
    assert results[1].loss == pytest.approx(results[0].loss, rel=2e-3)
    assert results[0].perplexity == pytest.approx(math.exp(results[0].loss))
    assert all(r.speed.tokens_per_second > 0 and r.speed.first_token_ms > 0 for r in results)
    assert results[1].size.parameters == trained.count_params()
    assert results[1].size.file_bytes == path.stat().st_size
    assert results[1].size.gzip_bytes < results[1].size.file_bytes
    assert results[1].size.nonzero_share < 0.75
    with tokens_as_input(trained):
        assert trained.evaluate(corpus.validation, verbose=0)[0] == pytest.approx(
            results[0].loss, rel=1e-2
        )


def test_sizes(tmp_path):
    model = make_gpt()
    tfgptopt.prune(model, 0.5, targets="feedforward_intermediate_dense/kernel")
    size = keras_size(model)
    zeros = sum(int((w.numpy() == 0).sum()) for w in model.weights)
    assert size.parameters == model.count_params()
    assert size.nonzero_share == pytest.approx(1 - zeros / size.parameters)
    assert size.file_bytes > 4 * size.parameters
    file = tfgptopt.export(model, tmp_path / "gpt.tflite")
    assert tflite_size(file).nonzero_share == pytest.approx(size.nonzero_share)
    assert gzip_size(file) == pytest.approx(len(gzip.compress(file.read_bytes())), rel=0.01)


def test_bad_input(corpus):
    with pytest.raises(ValueError, match="is empty"):
        tfgptopt.evaluate({}, corpus.validation)
    with pytest.raises(ValueError, match=r"'x': Expected a keras_hub.*or a preset"):
        tfgptopt.evaluate({"x": 5}, corpus.validation)
