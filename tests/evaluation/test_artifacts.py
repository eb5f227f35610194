"""Artifacts of every kind, on texts by folder, against plain numpy on the Keras model's logits."""

import itertools
import sys
import time

import keras_hub
import numpy as np
import pytest
from conftest import make_gpt

import tfgptopt
from tfgptopt.evaluation import Texts, Windows, open_artifact, read_texts
from tfgptopt.evaluation.texts import windows_of

SHORT = Windows(16)


@pytest.fixture(scope="module")
def gpt(corpus):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=32, add_start_token=False
    )
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    for weight in model.weights:  # So that some tokens are likelier than others.
        if "embedding" in weight.path:
            weight.assign(6 * weight.numpy())
    return model


@pytest.fixture(scope="module")
def paths(gpt, tmp_path_factory):
    """The model as a file, a SavedModel and a preset."""
    folder = tmp_path_factory.mktemp("artifacts")
    gpt.save_to_preset(str(folder / "preset"))
    file = tfgptopt.export(gpt, folder / "gpt.tflite")
    return [file, tfgptopt.export(gpt, folder / "saved"), folder / "preset"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in {"a/one": "import os\nimport sys\n" * 5, "b/two": "def f(x):\n" * 9}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return read_texts(folder)


def logs_of(gpt, ids):
    """Logarithms of probabilities of the next token, `(tokens, vocabulary)`."""
    tokens = np.asarray([ids], np.int32)
    logits = gpt.backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    logits = np.asarray(gpt.backbone.token_embedding(logits, reverse=True), np.float64)[0]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(gpt, ids, windows):
    """Losses of all tokens but the first, each from what its window holds before it."""
    losses, step, ends = [], windows.stride or windows.length, [1]
    while ends[-1] < len(ids):
        added = windows.length if len(ends) == 1 else step
        ends.append(min(ends[-1] + added, len(ids)))
    for begin, end in itertools.pairwise(ends):
        first = begin - 1 if windows.stride is None else max(0, end - 1 - windows.length)
        logs = logs_of(gpt, ids[first : end - 1])
        losses += [-logs[target - 1 - first, ids[target]] for target in range(begin, end)]
    return losses


@pytest.mark.parametrize("windows", [SHORT, Windows(16, stride=5)], ids=["packed", "sliding"])
def test_perplexity_of_every_kind_is_that_of_numpy(gpt, paths, texts, corpus, windows):
    paths = paths if windows is SHORT else paths[:1]
    named = {"Keras": gpt, **{path.name: path for path in paths}}
    results = tfgptopt.evaluate(
        named, texts, new_tokens=1, runs=1, windows=windows, tokenizer=corpus.tokenizer
    )
    encode = open_artifact(gpt).tokenizer.encode
    losses = {
        domain: by_hand(gpt, encode(members[0], False), windows)
        for domain, members in texts.domains.items()
    }
    whole = np.concatenate(list(losses.values()))
    total = sum(len(members[0]) - 1 for members in texts.domains.values())  # ASCII; i and d.
    for result in results:
        assert result.loss == pytest.approx(whole.mean(), rel=1e-4)
        assert result.quality.tokens == len(whole)
        bits = whole.sum() / np.log(2) / total
        assert result.quality.bits_per_byte == pytest.approx(bits, rel=0.05)
        for domain, expected in losses.items():
            assert result.quality.domains[domain].loss == pytest.approx(np.mean(expected), rel=1e-4)
        assert abs(result.quality.change) < 1e-4 and result.quality.agreement > 0.99
        assert result.size.file_bytes > 0 and result.speed.tokens_per_second > 0
    made = [open_artifact(one).generation([5, 9, 7], 6)() for one in named.values()]
    assert all(tokens == made[0] for tokens in made) and len(made[0]) == 6


def test_a_start_token_begins_each_window(corpus):
    tokenizer = open_artifact(make_gpt(300, keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer))).tokenizer  # fmt: skip
    text = "import os\n" * 30
    ids = tokenizer.encode(text, False)
    cut = windows_of(Texts({"a": (text,)}), tokenizer, 7, Windows(16))
    rows = [
        (ids, labels[weights > 0])
        for batch, targets, weight in cut.batches.as_numpy_iterator()
        for ids, labels, weights in zip(batch["token_ids"], targets, weight, strict=True)
    ]
    assert all(row[0] == 7 for row, _ in rows)
    assert np.concatenate([labels for _, labels in rows]).tolist() == ids
    assert cut.sizes.sum() == pytest.approx(len(text))


def test_tokenizers_that_differ_are_compared_by_bits(gpt, corpus, texts):
    from tfgptopt.data import standard_library, train_tokenizer

    other = train_tokenizer(standard_library()[:3], 280)
    coarse = make_gpt(280, keras_hub.models.GPT2CausalLMPreprocessor(other, sequence_length=32))
    first, second = tfgptopt.evaluate(
        {"a": gpt, "b": coarse}, texts, new_tokens=1, runs=1, windows=SHORT
    )
    assert first.quality.tokens != second.quality.tokens
    assert second.quality.kl is None and second.quality.change is None
    assert 1 < second.quality.bits_per_byte < 20 and first.quality.kl is not None


def test_passages_that_changed_most_are_those_of_numpy(gpt, texts):
    worse = make_gpt(300, gpt.preprocessor)
    worse.set_weights([w * (1 + 0.2 * (w.ndim > 1)) for w in gpt.get_weights()])
    _, second = tfgptopt.evaluate({"a": gpt, "b": worse}, texts, new_tokens=1, runs=1,
                                  windows=Windows(32))  # fmt: skip
    ids = open_artifact(gpt).tokenizer.encode(texts.domains["a"][0], False)
    rises = np.subtract(*(by_hand(m, ids, Windows(32)) for m in (worse, gpt)))
    best = max(abs(rises[i : i + 32].mean()) for i in range(0, len(rises), 32)
               if len(rises[i : i + 32]) >= 16)  # fmt: skip
    largest = second.quality.changed[0]
    assert abs(largest.rise) >= best - 1e-3
    assert len(largest.tokens) == len(largest.rises) and "".join(largest.tokens) in "".join(
        text for members in texts.domains.values() for text in members
    )


def test_loading_is_measured_in_a_process_of_its_own(paths, texts):
    (result,) = tfgptopt.evaluate(paths[:1], texts, new_tokens=1, runs=1, windows=SHORT,
                                  processes=True, prompts=["import"])  # fmt: skip
    assert 0 < result.speed.load_seconds < 60
    assert 20e6 < result.speed.peak_rss_bytes < 400e6  # TensorFlow alone takes more.
    assert isinstance(result.continuations["import"], str)


def test_latencies_by_depth_and_a_stopwatch(corpus, tmp_path):
    lm = tfgptopt.TFLiteCausalLM(tfgptopt.export(make_gpt(context=160), tmp_path / "gpt.tflite"))
    from tfgptopt.evaluation.speed import compare_speed, with_latencies

    artifact = {"a": open_artifact(lm)}
    speed = with_latencies(compare_speed(artifact, [1, 2, 3], 100, 5), artifact)["a"]
    assert list(speed.by_depth) == ["16", "64"]
    one = speed.by_depth["64"]
    assert 0 < one.p50 <= one.p95 <= one.p99
    times = []
    for _ in range(5):
        lm.reset()
        began = time.perf_counter()
        lm.generate([1, 2, 3], max_length=103, stop=None)
        times.append(time.perf_counter() - began)
    assert 0.4 < speed.tokens_per_second / (100 / np.median(times)) < 2.5


def test_speed_by_batch_is_that_of_a_stopwatch(tmp_path):
    from tfgptopt.evaluation.speed import Speed, with_latencies
    from tfgptopt.exporting import TFLite

    sizes = TFLite(batch_sizes=(4,))
    artifact = open_artifact(tfgptopt.export(make_gpt(context=20), tmp_path / "gpt.tflite", sizes))
    speed = with_latencies({"a": Speed(1.0, 1.0)}, {"a": artifact}, (16, 64))["a"]
    assert {size: list(by) for size, by in speed.by_batch.items()} == {"1": ["16"], "4": ["16"]}
    assert speed.by_batch["1"]["16"] == pytest.approx(1e3 / speed.by_depth["16"].p50)
    step, times = artifact.steps_together(16, 4), []
    for _ in range(20):
        began = time.perf_counter()
        made = step()
        times.append(time.perf_counter() - began)
    assert len(made) == 4
    assert 0.3 < speed.by_batch["4"]["16"] / (4 / np.median(times)) < 3


def test_bad_artifacts_and_texts(gpt, texts, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"'model.onnx'.*cannot be measured.*\.gguf"):
        tfgptopt.evaluate([tmp_path / "model.onnx"], texts)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        tfgptopt.evaluate([tmp_path / "none.gguf"], texts)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=r"tfgptopt\[gguf\]"):
        tfgptopt.evaluate([tmp_path / "model.gguf"], texts)
    with pytest.raises(ValueError, match="has a context of 32 tokens, and windows have 128"):
        tfgptopt.evaluate({"a": gpt}, texts)
    with pytest.raises(ValueError, match=r"'a' has no tokenizer.*--tokenizer"):
        tfgptopt.evaluate({"a": make_gpt()}, texts)
    for bad in ({"length": 1}, {"stride": 16, "length": 16}, {"stride": 0}):
        with pytest.raises(ValueError, match="Received"):
            Windows(**bad)
    with pytest.raises(ValueError, match="text is empty"):
        Texts({"a": ("  ",)})
