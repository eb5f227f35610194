"""Quality against plain numpy."""

import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt

import tfgptopt
from tfgptopt.evaluation.artifacts import open_artifact
from tfgptopt.evaluation.quality import compare_quality
from tfgptopt.evaluation.results import load_results, save_results
from tfgptopt.quantization import Int4


@pytest.fixture(scope="module")
def data():
    tokens = np.random.default_rng(0).integers(0, 300, (6, 17), np.int32)
    weights = np.ones((6, 16), np.float32)
    weights[0, 5:] = weights[3, :4] = weights[5] = 0
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, :-1])}
    return tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:], weights)).batch(4)


def by_numpy(logits, known, labels, weights):
    """Returns the numbers by their definitions, token by token."""
    logits, known = (np.asarray(x, np.float64) for x in (logits, known))
    sums = np.zeros((len(labels), 6))
    for row in range(len(labels)):
        for i in np.flatnonzero(weights[row]):
            logs, own = (x[row, i] - np.log(np.exp(x[row, i]).sum()) for x in (logits, known))
            label = labels[row, i]
            order = np.argsort(-logs)
            sums[row] += (
                1,
                -logs[label],
                order[0] == label,
                label in order[:5],
                (np.exp(own) * (own - logs)).sum(),
                order[0] == own.argmax(),
            )
    return sums


def test_numbers_are_those_of_numpy_for_models_and_files(data, tmp_path):
    gpt, rounded = make_gpt(), make_gpt()
    rounded.set_weights(gpt.get_weights())
    for model in (gpt, rounded):
        for weight in model.weights:  # So that some tokens are likelier than others.
            if "embedding" in weight.path:
                weight.assign(8 * weight.numpy())
    tfgptopt.quantize(rounded, Int4())
    path = tfgptopt.export(rounded, tmp_path / "gpt.tflite")
    results = tfgptopt.evaluate(
        {"float": gpt, "int4": rounded, "file": path}, data, new_tokens=2, runs=1
    )
    batches = list(data.as_numpy_iterator())
    ids, labels, weights = (
        np.concatenate(x)
        for x in zip(*((x["token_ids"], y, w) for x, y, w in batches), strict=True)
    )
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    known, own = gpt(inputs), rounded(inputs)
    for result, logits in zip(results, (known, own, own), strict=True):
        sums, close = by_numpy(logits, known, labels, weights), 1e-4
        weight, loss, right, among, kl, same = sums.sum(0)
        quality = result.quality
        assert quality.loss == pytest.approx(loss / weight, rel=close)
        assert result.perplexity == pytest.approx(np.exp(loss / weight), rel=close)
        assert quality.accuracy == pytest.approx(right / weight)
        assert quality.top5_accuracy == pytest.approx(among / weight)
        assert quality.kl == pytest.approx(kl / weight, rel=5e-3, abs=1e-6)
        assert quality.agreement == pytest.approx(same / weight)
        assert quality.bits_per_byte is None  # There is no tokenizer.
        low, high = quality.intervals["loss"]
        assert low < quality.loss < high
    assert results[0].quality.change == pytest.approx(0) and results[0].quality.kl < 1e-6
    assert results[1].quality.kl > 1e-5 and results[1].quality.agreement < 1
    save_results(results, tmp_path / "results.json", {"text": "random"})
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["schema"] == 2 and saved["about"] == {"text": "random"}
    assert load_results(tmp_path / "results.json").results == tuple(results)
    saved["results"][0]["size"].pop("file_bytes")
    (tmp_path / "lacking.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"results, size: expected the fields .*file_bytes"):
        load_results(tmp_path / "lacking.json")
    (tmp_path / "old.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(ValueError, match="schema 1; this tfgptopt reads schema 2"):
        load_results(tmp_path / "old.json")
    assert saved["results"][2]["quality"]["kl"] == results[2].quality.kl
    assert saved["results"][0]["quality"]["intervals"]["loss"][0] < results[0].loss


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of windows whose loss is known, 95 % of the intervals hold the mean."""
    from tfgptopt.evaluation.quality import _quality

    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        sums = np.zeros((40, 6))
        sums[:, 0] = 1
        sums[:, 1] = generator.gamma(2.0, 1.0, 40)
        low, high = _quality(sums, None, None).intervals["loss"]
        held += low <= 2.0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_the_change_is_paired(data):
    """Windows differ more than models do: the change is known better than the losses."""
    gpt, other = make_gpt(), make_gpt()
    other.set_weights([w * (1 + 1e-3) for w in gpt.get_weights()])
    found = compare_quality({"a": open_artifact(gpt), "b": open_artifact(other)}, data, "a")
    low, high = found["b"].intervals["change"]
    loss = found["b"].intervals["loss"]
    assert high - low < 0.5 * (np.exp(loss[1] - loss[0]) - 1)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(corpus, trained, tmp_path):
    path = tfgptopt.export(trained, tmp_path / "gpt.tflite")
    model, file = tfgptopt.evaluate(
        {"model": trained, "file": path}, corpus.validation, new_tokens=2, runs=1
    )
    tokenizer, total, nats = trained.preprocessor.tokenizer, 0, 0.0
    for _, labels, weights in corpus.validation.as_numpy_iterator():
        for row, weight in zip(labels, weights, strict=True):
            kept = row[weight > 0].tolist()
            text = tokenizer.detokenize(kept) if kept else ""
            total += len(str(text).replace("<|endoftext|>", "").encode())  # No text.
            nats += len(kept)
    expected = model.loss * nats / np.log(2) / total
    assert model.quality.bits_per_byte == pytest.approx(expected, rel=1e-3)
    assert file.quality.bits_per_byte == pytest.approx(model.quality.bits_per_byte, rel=1e-2)


def test_models_of_other_vocabularies_have_no_divergence(gpt, data):
    wider = make_gpt(310)
    found = compare_quality({"a": open_artifact(gpt), "b": open_artifact(wider)}, data, "a")["b"]
    assert found.kl is None and found.agreement is None and "kl" not in found.intervals
    assert np.isfinite(found.change) and np.isfinite(found.loss)


def test_bad_input(gpt, data, tmp_path):
    with pytest.raises(ValueError, match="`reference` must be one of"):
        tfgptopt.evaluate({"a": gpt}, data, reference="b")
    empty = data.map(lambda x, y, w: (x, y, 0 * w))
    with pytest.raises(ValueError, match="no tokens with weight"):
        compare_quality({"a": open_artifact(gpt)}, empty)
    small = {"small": open_artifact(make_gpt(200))}
    known = data.map(lambda x, y, w: ({**x, "token_ids": x["token_ids"] % 200}, y, w))
    with pytest.raises(ValueError, match=r"'small' does not know token 2.*compare bits per byte"):
        compare_quality(small, known)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="Cannot write"):
        save_results([], tmp_path / "file" / "results.json")


def test_predictions_that_are_no_numbers_are_an_error(data):
    broken = make_gpt()
    weight = next(w for w in broken.weights if "layer_norm/gamma" in w.path)
    weight.assign([float("nan"), *weight.numpy()[1:]])
    named = {"whole": open_artifact(make_gpt()), "broken": open_artifact(broken)}
    with pytest.raises(ValueError, match=r"'broken' predicts NaN or infinity for .* tokens"):
        compare_quality(named, data, "whole")
