"""What a teacher said, on disk: bytes, resuming, checks, and training from it."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from conftest import VOCABULARY, make_gpt, random_batch
from decoder.families import make
from distillation.test_losses import log_probabilities, ragged

from tfgptopt.distillation import Distiller, HardLabels, HiddenStates, LogitsKL, Recording, record

ROWS, TOKENS = 10, 16


def data(seed=0, rows=ROWS, batch=4):
    return tf.data.Dataset.from_tensor_slices(random_batch(rows, TOKENS, seed)).batch(batch)


@pytest.fixture(scope="module")
def teacher():
    keras.utils.set_random_seed(3)
    model = make_gpt()
    model.set_weights([8 * weight for weight in model.get_weights()])
    return model


def test_the_likeliest_tokens_are_on_disk(teacher, tmp_path):
    recording = record(teacher, data(), tmp_path / "said", top_k=8, temperature=2.0)
    inputs, _ = random_batch(ROWS, TOKENS)
    indices, logs = recording.lookup(inputs)
    wanted = log_probabilities(teacher(inputs), 2.0)
    order = np.argsort(-wanted, axis=-1)[..., :8]
    assert (np.sort(indices, -1) == np.sort(order, -1)).mean() > 0.999  # Ties may fall either way.
    np.testing.assert_allclose(logs, np.take_along_axis(wanted, indices, -1), rtol=2e-3)
    assert recording.file_bytes <= 1.5 * 8 * 4 * ROWS * TOKENS
    assert recording.rows == ROWS and recording.vocabulary_size == VOCABULARY


def test_large_vocabularies_take_five_bytes(tmp_path):
    model = make("GPT2", vocabulary_size=70_000, hidden_dim=8)
    recording = record(model, data(), tmp_path / "said", top_k=16)
    inputs, _ = random_batch(ROWS, TOKENS)
    indices, _ = recording.lookup(inputs)
    logits = np.asarray(model(inputs))
    np.testing.assert_array_equal(indices[..., 0], logits.argmax(-1))
    assert indices.max() > 1 << 16
    assert recording.file_bytes <= 1.5 * 16 * 4 * ROWS * TOKENS


def test_windows_are_found_in_any_order(teacher, tmp_path):
    recording = record(teacher, data(), tmp_path / "said", top_k=4)
    inputs, _ = random_batch(ROWS, TOKENS)
    order = np.random.default_rng(0).permutation(ROWS)
    straight = recording.lookup(inputs)
    mixed = recording.lookup({key: value[order] for key, value in inputs.items()})
    for a, b in zip(straight, mixed, strict=True):
        np.testing.assert_array_equal(a[order], b)


def test_an_interrupted_recording_resumes_to_the_same_bytes(teacher, tmp_path, monkeypatch):
    from tfgptopt.distillation import teacher_to_disk

    whole = record(teacher, data(), tmp_path / "whole", top_k=4)
    keys, calls = teacher_to_disk.window_keys, []

    def killing(inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return keys(inputs)

    monkeypatch.setattr(teacher_to_disk, "window_keys", killing)
    with pytest.raises(KeyboardInterrupt):
        record(teacher, data(), tmp_path / "said", top_k=4)
    monkeypatch.setattr(teacher_to_disk, "window_keys", keys)
    with pytest.raises(ValueError, match="not whole"):
        Recording(tmp_path / "said")
    rows = tmp_path / "said" / "rows.bin"
    assert rows.stat().st_size == (tmp_path / "whole" / "rows.bin").stat().st_size * 8 // ROWS
    with rows.open("r+b") as stream:  # The last row was cut off while it was written.
        stream.truncate(rows.stat().st_size - 5)

    with pytest.raises(ValueError, match="another top_k"):
        record(teacher, data(), tmp_path / "said", top_k=5)
    with pytest.raises(ValueError, match="another corpus"):
        record(teacher, data(seed=1), tmp_path / "said", top_k=4)
    resumed = record(teacher, data(), tmp_path / "said", top_k=4)
    assert resumed.rows == ROWS
    assert rows.read_bytes() == (whole.path / "rows.bin").read_bytes()
    assert sorted(p.name for p in rows.parent.iterdir()) == ["recording.json", "rows.bin"]


def test_a_recording_of_something_else_is_refused(teacher, tmp_path):
    path = tmp_path / "said"
    record(teacher, data(), path, top_k=4)
    before = (path / "rows.bin").read_bytes(), (path / "recording.json").read_bytes()
    assert record(teacher, data(), path, top_k=4).rows == ROWS  # The same one is taken as it is.
    other = make_gpt()
    cases = [
        (lambda: record(other, data(), path, top_k=4), "another teacher"),
        (lambda: record(teacher, data(), path, 4, temperature=2.0), "another temperature"),
        (lambda: record(teacher, data(seed=1), path, 4), "another corpus"),
        (lambda: record(teacher, data(rows=6), path, 4), "another corpus"),
        (lambda: record(teacher, data(), tmp_path, 4), "is no recording"),
    ]
    for make_wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            make_wrong()
    assert before == ((path / "rows.bin").read_bytes(), (path / "recording.json").read_bytes())


def test_another_tokenizer_is_refused(teacher, tmp_path, corpus):
    import keras_hub

    path = tmp_path / "said"
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=16)
    size = corpus.tokenizer.vocabulary_size()
    record(make_gpt(size, preprocessor), data(), path, top_k=4)
    vocabulary = corpus.tokenizer.vocabulary
    swapped = dict(zip(vocabulary, [1, 0, *range(2, len(vocabulary))], strict=True))
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=swapped, merges=corpus.tokenizer.merges)
    other = make_gpt(size, keras_hub.models.GPT2CausalLMPreprocessor(tokenizer))
    with pytest.raises(ValueError, match="another tokenizer"):
        Distiller(other, Recording(path))


def test_bad_input(teacher, tmp_path, gpt):
    path = tmp_path / "said"
    empty, endless = data().take(0), data().repeat()
    cases = [
        (lambda: record(teacher, empty, path), "empty"),
        (lambda: record(teacher, endless, path), "repeats forever"),
        (lambda: record(teacher, [1, 2], path), "tf.data.Dataset"),
        (lambda: record(teacher, data(), path, top_k=0), "from 1 to"),
        (lambda: record(teacher, data(), path, top_k=VOCABULARY + 1), "from 1 to"),
        (lambda: record(teacher, data(), path, temperature=0.0), "above 0"),
        (lambda: record("teacher", data(), path), "must be a Keras"),
    ]
    for make_wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            make_wrong()
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match="no recording"):
        Recording(path)
    recording = record(teacher, data(), path, top_k=4)
    cases = [
        (lambda: Distiller(gpt, recording, [HiddenStates()]), "needs the teacher itself"),
        (lambda: Distiller(gpt, recording, [LogitsKL(2.0)]), "with temperature 1.0"),
        (lambda: Distiller(make("GPT2"), recording), "300 tokens, and the student 211"),
    ]
    for make_wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            make_wrong()
    distiller = Distiller(gpt, recording)
    distiller.compile()
    with pytest.raises(ValueError, match="another corpus"):
        distiller.fit(data(seed=1), verbose=0)
    with pytest.raises(ValueError, match=r"tf\.data\.Dataset"):
        distiller.fit(*random_batch(), verbose=0)
    header = json.loads((path / "recording.json").read_text())
    (path / "recording.json").write_text(json.dumps({**header, "rows": 11}))
    with pytest.raises(ValueError, match="damaged"):
        Recording(path)
    (path / "recording.json").write_text(json.dumps(header)[:-9])
    for read in (lambda: Recording(path), lambda: record(teacher, data(), path, top_k=4)):
        with pytest.raises(ValueError, match=r"recording\.json cannot be read"):
            read()
    (path / "recording.json").write_text(json.dumps(header))
    Recording(path)
    (path / "rows.bin").unlink()
    with pytest.raises(ValueError, match="and has 0 bytes"):
        Recording(path)


def test_training_from_disk_is_training_from_the_teacher(teacher, tmp_path):
    """With all tokens recorded, only the rounding of float16 is between them."""
    recording = record(teacher, data(), tmp_path / "said", top_k=VOCABULARY - 1)
    losses = [LogitsKL(), HardLabels(0.5)]
    weights = []
    for source in (teacher, recording):
        keras.utils.set_random_seed(0)
        student = make_gpt()
        distiller = Distiller(student, source, losses)
        distiller.compile(optimizer=keras.optimizers.SGD(0.1))
        logs = distiller.fit(data(), epochs=2, verbose=0).history
        weights.append((logs["loss"], student.get_weights()))
    np.testing.assert_allclose(weights[0][0], weights[1][0], rtol=2e-3)
    for a, b in zip(weights[0][1], weights[1][1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_padding_is_left_out_of_a_recorded_loss(tmp_path):
    student, teacher = make("GPT2", dropout=0.0), make("GPT2", num_layers=3)
    inputs, labels, weights = ragged()
    batches = tf.data.Dataset.from_tensor_slices((inputs, labels, weights)).batch(4)
    recording = record(teacher, batches, tmp_path / "said", top_k=5)
    distiller = Distiller(student, recording)
    distiller.compile()
    found = distiller.evaluate(batches, verbose=0, return_dict=True)["loss"]
    indices, logs = recording.lookup(inputs)
    q = np.take_along_axis(log_probabilities(student(inputs)), indices, -1)
    rest = [np.log1p(-np.exp(x.astype(np.float64)).sum(-1)) for x in (logs, q)]
    values = (np.exp(logs) * (logs - q)).sum(-1) + np.exp(rest[0]) * (rest[0] - rest[1])
    counts = weights * inputs["padding_mask"]
    assert found == pytest.approx((values * counts).sum() / counts.sum(), rel=1e-2)


def test_text_is_recorded_as_the_student_reads_it(corpus, tmp_path):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=16)
    gpt = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    texts = ["import os", "def f(x):", "x = 1", "class A:"]
    recording = record(gpt, texts, tmp_path / "said", top_k=4)
    assert (recording.rows, recording.tokens) == (4, 16)
    distiller = Distiller(make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor), recording)
    distiller.compile()
    dataset = tf.data.Dataset.from_tensor_slices(texts[::-1]).batch(2)
    assert np.isfinite(distiller.fit(dataset, verbose=0).history["loss"][0])
