"""Texts that are decoded together are those that each would be alone."""

import keras
import keras_hub
import numpy as np
import pytest
from decoder.families import CONTEXT, VOCABULARY, make, prompt

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.generation import Beam, Regex, TFLiteCausalLM, TopK, caches
from tfgptopt.generation.beams import _largest
from tfgptopt.generation.caches import Caches

PROMPTS = [prompt(length, length) for length in (3, 40, 1, 17, CONTEXT - 1, CONTEXT)]


@pytest.fixture(scope="module")
def model():
    return make("GPT2")


@pytest.fixture(scope="module")
def lm(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "gpt.tflite"
    return TFLiteCausalLM(tfgptopt.export(model, path, TFLite(CONTEXT, batch_sizes=(4, 2))))


def alone(lm, prompts, **settings):
    return [lm.generate(one, **settings) for one in prompts]


@pytest.mark.parametrize("settings", [{}, {"sampler": TopK(5), "seed": 3}, {"strip_prompt": True}])
def test_texts_of_all_lengths_are_continued_as_alone(settings, lm, monkeypatch):
    monkeypatch.setattr(caches, "_STEP", 16)  # Caches grow while there are texts in them.
    assert lm.batch_sizes == [2, 4]
    found, counts = lm.generate(PROMPTS, stop=None, return_stats=True, **settings)
    assert found == alone(lm, PROMPTS, stop=None, **settings)
    assert counts.tokens == sum(CONTEXT - len(one) for one in PROMPTS)
    assert counts.calls < 0.6 * counts.tokens


def test_a_free_slot_takes_the_next_text_and_few_are_left_to_a_small_batch(lm, monkeypatch):
    taken = []
    some = Caches.some

    def watched(self, cache, slots, texts, target):
        taken.append((list(slots), texts))
        return some(self, cache, slots, texts, target)

    monkeypatch.setattr(Caches, "some", watched)
    lengths = [20, 5, 8, 30, 12, 9]
    prompts = [prompt(4, i) for i in range(6)]
    ends = [text[4 + n] for text, n in zip(alone(lm, prompts), lengths, strict=True)]
    found = lm.generate(prompts, stop=ends)
    assert found == alone(lm, prompts, stop=ends)
    assert len({len(text) for text in found}) > 1
    assert [texts for _, texts in taken] == [4]


def test_integers_in_the_cache_are_placed_and_moved(tmp_path):
    path = tfgptopt.export(
        make("GPT2"), tmp_path / "gpt.tflite", TFLite(CONTEXT, "int8", batch_sizes=(3,))
    )
    lm = TFLiteCausalLM(path)
    assert lm.generate(PROMPTS, stop=None) == alone(lm, PROMPTS, stop=None)
    found = lm.beam_search(PROMPTS[0], beam=Beam(3), num_return_sequences=3, stop=None)
    for one in found:
        scores = lm.score(PROMPTS[0] + one.tokens)[len(PROMPTS[0]) - 1 :]
        assert one.score == pytest.approx(scores.sum(), abs=0.05)


def test_texts_and_their_stops(trained, tmp_path):
    path = tmp_path / "gpt.tflite"
    lm = TFLiteCausalLM(tfgptopt.export(trained, path, TFLite(batch_sizes=(4,))))
    prompts = ["import os\n", "def ", "é", "class A:\n    x = 1", "for i"]
    for settings in ({}, {"stop": [" ", "\n"]}, {"strip_prompt": True, "stop": None}):
        assert lm.generate(prompts, **settings) == alone(lm, prompts, **settings)
    digits = lm.generate(prompts, constraint=Regex("[0-9]{3}"), strip_prompt=True)
    assert all(text.isdigit() and len(text) <= 3 for text in digits)
    with pytest.raises(ValueError, match="Prompt 1 of 2: The prompt has"):
        lm.generate(["import", "x = " * 100])


def test_an_interrupted_batch_leaves_the_model_as_it_was(lm, monkeypatch):
    expected = alone(lm, PROMPTS, stop=None)
    grow = Caches._grow_layer

    def interrupted(self, cache, layer, rooms):
        if layer == 1:
            raise KeyboardInterrupt
        grow(self, cache, layer, rooms)

    monkeypatch.setattr(caches, "_STEP", 16)
    with monkeypatch.context() as patch:
        patch.setattr(Caches, "_grow_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lm.generate(PROMPTS, stop=None)
    assert lm.generate(PROMPTS, stop=None) == expected


def test_beams_are_those_of_keras_hub(lm, model):
    for seed, start in enumerate((prompt(5, 1), prompt(33, 2))):
        count, length = 3 + seed, len(start) + 20
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(start)] = start

        def following(text, cache, index):
            states = model.backbone({"token_ids": text, "padding_mask": keras.ops.ones(text.shape)})
            return model.backbone.token_embedding(states, reverse=True)[:, index - 1], None, cache

        sampler = keras_hub.samplers.BeamSampler(count, return_all_beams=True)
        mask = np.arange(length)[None] < len(start)
        texts, scores = sampler(following, keras.ops.array(padded), index=len(start), mask=mask)
        found = lm.beam_search(start, length, Beam(count), num_return_sequences=count, stop=None)
        np.testing.assert_allclose([one.score for one in found], scores[0], atol=1e-4)
        assert [start + one.tokens for one in found] == np.asarray(texts[0]).tolist()
        best = lm.generate(start, length, Beam(count), stop=None)
        assert best == start + found[0].tokens


def test_beams_that_end_are_kept_and_compared_by_their_length(lm, model):
    start = prompt(6, 9)
    free = lm.beam_search(start, beam=Beam(4), num_return_sequences=4, stop=None)
    end = free[0].tokens[12]
    for settings in (Beam(4), Beam(4, length_penalty=1.0), Beam(4, early_stopping=True)):
        found = lm.beam_search(start, beam=settings, num_return_sequences=4, stop=end)
        assert any(len(one.tokens) < CONTEXT - len(start) for one in found)
        for one in found:
            assert end not in one.tokens
            ended = len(start) + len(one.tokens) < CONTEXT
            tokens = one.tokens + [end] * ended
            total = lm.score(start + tokens)[len(start) - 1 :].sum()
            expected = total / len(tokens) ** settings.length_penalty
            assert one.score == pytest.approx(expected, abs=1e-3)
        assert [one.score for one in found] == sorted((x.score for x in found), reverse=True)


def test_the_search_is_over_when_nothing_better_can_come(lm):
    """Without a penalty longer texts only get less likely: what ends is not followed further."""
    start = prompt(6, 9)
    ends = list(range(VOCABULARY // 2))
    _, all_steps = lm.generate(start, sampler=Beam(2), stop=None, return_stats=True)
    _, few = lm.generate(start, sampler=Beam(2), stop=ends, return_stats=True)
    assert few.calls < 0.5 * all_steps.calls


def test_largest_scores_by_definition():
    generator = np.random.default_rng(0)
    for rows, columns in ((1, 3000), (4, 5000), (3, 64)):
        values = generator.normal(size=(rows, columns)).astype(np.float32)
        offsets = generator.normal(size=rows)
        expected = np.sort((values + offsets[:, None]).ravel())[::-1][:8]
        found = _largest(values, offsets, 8)
        np.testing.assert_allclose([one[2] for one in found], expected, rtol=1e-6)
        for row, column, score in found:
            assert score == pytest.approx(values[row, column] + offsets[row])


def test_bad_input(lm, model, tmp_path):
    plain = TFLiteCausalLM(tfgptopt.export(model, tmp_path / "plain.tflite", TFLite(CONTEXT)))
    with pytest.raises(ValueError, match=r"no batches.*batch_sizes=\(4,\)"):
        plain.beam_search([1])
    with pytest.raises(ValueError, match=r"Beam search with 5 beams.*batches of 2, 4"):
        lm.generate([1], sampler=Beam(5))
    with pytest.raises(ValueError, match="Beam search takes no `speculative`"):
        lm.generate([1], sampler="beam", speculative="auto")
    with pytest.raises(ValueError, match="num_return_sequences=5"):
        lm.beam_search([1], num_return_sequences=5)
    with pytest.raises(ValueError, match="Beams are for `generate`"):
        next(lm.stream("a", sampler="beam"))
    for wrong in ((1,), (2.0,), [4], (4, 4), (65,), 4):
        with pytest.raises(ValueError, match="batch_sizes"):
            TFLite(batch_sizes=wrong)
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="needs a reader for Sequential"):
        tfgptopt.export(dense, tmp_path / "dense.tflite", TFLite(batch_sizes=(2,)))
    for wrong in ({"num_beams": 0}, {"length_penalty": "1"}, {"early_stopping": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Beam(**wrong)
