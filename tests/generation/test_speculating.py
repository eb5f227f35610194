"""Guesses change how fast a text comes, never the text."""

import copy
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from decoder.families import CONTEXT, make, prompt
from hypothesis import given
from hypothesis import strategies as st

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.generation import Draft, NGram, TFLiteCausalLM, TopK
from tfgptopt.generation.guessing import Repeats
from tfgptopt.generation.samplers import Random, distribution
from tfgptopt.generation.speculating import Pace, accept
from tfgptopt.quantization import Int4, Int8

tokens_of_few = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@given(tokens_of_few, st.integers(1, 3), st.integers(0, 2), st.integers(1, 5))
def test_ngrams_guess_what_followed_the_longest_end_the_last_time(tokens, low, more, count):
    guesser = Repeats(NGram(max_ngram=low + more, min_ngram=low))
    for end in range(1, len(tokens) + 1):
        text = tokens[:end]
        expected = []
        for size in range(low + more, low - 1, -1):
            places = [i for i in range(len(text) - size) if text[i : i + size] == text[-size:]]
            if size < len(text) and places:
                expected = text[places[-1] + size :][:count]
                break
        guesser.follow(text)
        assert guesser.guess(text, count).tokens == expected


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of few tokens whose texts repeat, rounded; and a smaller one of the same tokens."""
    folder = tmp_path_factory.mktemp("speculation")
    for name, family in (("large", "GPT2"), ("windows", "Gemma 3")):
        model = make(family)
        if name == "large":
            tfgptopt.quantize(model, Int8())
        tfgptopt.export(model, folder / f"{name}.tflite", TFLite(CONTEXT))
    small = make("GPT2", num_layers=1, max_sequence_length=64)
    tfgptopt.export(small, folder / "small.tflite", TFLite(64))
    return folder


@pytest.fixture(scope="module")
def lm(files):
    return TFLiteCausalLM(files / "large.tflite")


class Eager(Pace):
    """Guesses as much as it may, whatever it costs."""

    def count(self, left):
        return max(0, min(self._most, left))


@pytest.mark.parametrize("name", ["large", "windows"])
def test_greedy_texts_are_those_of_plain_decoding(name, files, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    model = TFLiteCausalLM(files / f"{name}.tflite")
    ways = [NGram(min_ngram=1)] + ([Draft(files / "small.tflite", 3)] if name == "large" else [])
    for way in ways:
        kept = 0
        for seed in range(6):
            start = prompt(3 + seed, seed) * 3
            plain = model.generate(start, max_length=CONTEXT, stop=None)
            text, counts = model.generate(
                start, max_length=CONTEXT, stop=None, speculative=way, return_stats=True
            )
            assert text == plain
            assert counts.tokens == CONTEXT - len(start) >= counts.calls
            # Each call gives one token more than guesses that were kept.
            assert counts.tokens == counts.calls + counts.accepted
            kept += counts.accepted
        assert kept > 0


def test_a_model_that_guesses_for_itself_is_always_right(files, lm, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    way = Draft(files / "large.tflite", num_tokens=3)
    start = prompt(5)
    text, counts = lm.generate(
        start, max_length=5 + 4 * 6, stop=None, speculative=way, return_stats=True
    )
    assert text == lm.generate(start, max_length=5 + 4 * 6, stop=None)
    assert counts.acceptance == 1.0 and counts.calls == 6 and counts.tokens_per_call == 4.0


def test_a_draft_with_less_context_guesses_as_far_as_it_can(files, lm, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    start = prompt(62)
    way = Draft(files / "small.tflite")
    text, counts = lm.generate(
        start, max_length=CONTEXT, stop=None, speculative=way, return_stats=True
    )
    assert text == lm.generate(start, max_length=CONTEXT, stop=None)
    assert 0 < counts.guessed <= 4


@pytest.mark.parametrize("certain", [True, False])
def test_kept_and_redrawn_tokens_have_the_distribution_of_the_model(certain):
    generator = np.random.default_rng(0)
    chance = np.array([0.5, 0.3, 0.15, 0.05, 0.0])
    drawn = np.array([0.1, 0.6, 0.1, 0.1, 0.1])
    rounds, counts, kept = 20_000, np.zeros(5), 0
    for _ in range(rounds):
        guess = 1 if certain else int(generator.choice(5, p=drawn))
        token, right = accept(chance, guess, None if certain else drawn, generator)
        assert not right or token == guess
        counts[token] += 1
        kept += right
    assert counts[4] == 0
    expected = rounds * chance[:4]
    # Three degrees of freedom: beyond 16.3 once in a thousand.
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3
    # Leviathan et al.: the share that is kept is the overlap of both distributions.
    overlap = chance[1] if certain else np.minimum(chance, drawn).sum()
    assert kept / rounds == pytest.approx(overlap, abs=0.02)


def test_the_distribution_is_what_samplers_draw_from():
    logits = np.array([1.0, 3.0, 2.0, -1.0])
    left = np.exp([3.0 / 2, 2.0 / 2])
    found = distribution(logits, [0], [TopK(2), Random(2.0)])
    np.testing.assert_allclose(found, [0, left[0] / left.sum(), left[1] / left.sum(), 0])


def test_drawn_texts_repeat_with_a_seed_and_stay_among_what_is_left(lm, files, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    options = {"max_length": 40, "sampler": TopK(3), "stop": None, "seed": 1}
    start = prompt(4) * 3
    for way in (NGram(min_ngram=1), Draft(files / "small.tflite")):
        first = lm.generate(start, speculative=way, **options)
        assert first == lm.generate(start, speculative=way, **options) and len(first) == 40
        scores = lm.score(first)[len(start) - 1 :]
        ranks = []
        for i in range(len(start), len(first)):
            # The likeliest three of the model itself, read anew.
            cache = lm._engine.new_cache()
            lm._engine.read(cache, first[: i - 1])
            logits = lm._engine.decode(cache, first[i - 1])
            ranks.append(int((logits > logits[first[i]]).sum()))
        assert max(ranks) <= 2 and len(scores) == len(ranks)


def test_guesses_are_made_where_they_pay():
    def pace(free=True, costs=(10.0, 11.0, 12.0), right=True):
        made = Pace([4, 8, 128], 7, free)
        for length, seconds in zip((1, 4, 8), costs, strict=True):
            made.took(length, 100 * seconds)  # The first makes buffers, and tells nothing.
            made.took(length, seconds)
        for _ in range(60):
            made.fared(right)
        return made

    assert pace().count(100) == 7
    assert pace().count(2) == 2 and pace().count(0) == 0
    wrong = pace(right=False)
    assert [bool(wrong.count(100)) for _ in range(64)] == [False] * 63 + [True]  # Tried again.
    assert pace(costs=(10.0, 30.0, 90.0)).count(100) == 3  # Four tokens for three calls.
    assert pace(costs=(10.0, 50.0, 90.0)).count(100) == 0
    costly = pace(free=False, right=False)
    assert [costly.count(100) for _ in range(64)] == [0] * 63 + [1]
    slow = pace(free=False)
    slow.guessed(1, 10.0)  # A draft that takes as long as the model.
    assert slow.count(100) == 0
    assert Pace([], 7, True).count(100) == 0


def test_stops_sessions_and_streams_are_those_of_plain_decoding(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    lm = TFLiteCausalLM(tfgptopt.export(trained, tmp_path / "gpt.tflite"))
    way = NGram(min_ngram=1)
    text = "a a a a a a"
    plain = lm.generate(text, strip_prompt=True)
    assert lm.generate(text, strip_prompt=True, speculative=way) == plain
    stop = plain[len(plain) // 3 : len(plain) // 3 + 3]
    stopped = lm.generate(text, strip_prompt=True, stop=stop)
    assert lm.generate(text, strip_prompt=True, stop=stop, speculative=way) == stopped
    assert "".join(lm.stream(text, stop=stop, speculative=way)) == stopped
    ids = lm.tokenize(text)
    end = lm.generate(ids)[len(ids) + 2]
    assert lm.generate(ids, stop=end, speculative=way) == lm.generate(ids, stop=end)
    for session in (lm.session(), lm.session(way), lm.session(way).fork()):
        turns = [session.generate(piece, max_new_tokens=5) for piece in ("a a a", " b b")]
        assert turns == [lm.session().generate("a a a", max_new_tokens=5), turns[1]]
        assert session.tokens[-5:] == lm.generate(session.tokens[:-5], len(session.tokens))[-5:]


def test_bad_input_is_refused_early(lm, files, tmp_path, trained):
    start = prompt(4)
    with pytest.raises(ValueError, match="`speculative` must be None, 'auto'"):
        lm.generate(start, speculative="fast")
    with pytest.raises(ValueError, match="`min_ngram` must not be above"):
        NGram(2, 3)
    for settings_ in ({"max_ngram": 0}, {"num_tokens": True}, {"num_tokens": 0}):
        with pytest.raises(ValueError, match="must be an int >= 1"):
            NGram(**settings_)
    with pytest.raises(ValueError, match="`num_threads` must be"):
        Draft("x.tflite", num_threads=0)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        lm.generate(start, speculative=Draft(tmp_path / "none.tflite"))
    other = Draft(tfgptopt.export(trained, tmp_path / "other.tflite"))
    with pytest.raises(ValueError, match="another vocabulary than the model"):
        lm.session(other)
    with pytest.raises(ValueError, match="another vocabulary"):
        lm.stream("x", speculative=other)
    assert dataclasses.asdict(Draft("a.tflite")) == {
        "path": Path("a.tflite"),
        "num_tokens": 7,
        "num_threads": None,
    }


def test_drawn_texts_have_the_distribution_of_the_model_for_any_guesser(files, lm, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    start, rounds = prompt(6), 400
    cache = lm._engine.new_cache()
    lm._engine.read(cache, start[:-1])
    chance = distribution(lm._engine.decode(cache, start[-1]), start, [TopK(3)])
    likely = np.flatnonzero(chance)
    # The model guesses for itself: all is kept, and what is kept must differ from seed to seed.
    for way in (Draft(files / "large.tflite", 2), Draft(files / "small.tflite", 2)):
        options = {"max_length": 8, "sampler": TopK(3), "stop": None, "strip_prompt": True}
        firsts = [lm.generate(start, seed=s, speculative=way, **options)[0] for s in range(rounds)]
        counts = np.array([firsts.count(token) for token in likely])
        expected = rounds * chance[likely]
        assert counts.sum() == rounds
        # Two degrees of freedom: beyond 13.8 once in a thousand.
        assert ((counts - expected) ** 2 / expected).sum() < 13.8


def test_settings_stay_settings_and_another_file_is_another_draft(files, lm, tmp_path):
    way = Draft(files / "small.tflite")
    lm.generate(prompt(4), max_length=8, speculative=way)
    assert pickle.loads(pickle.dumps(way)) == copy.deepcopy(way) == way
    assert way == Draft(str(files / "small.tflite")) and hash(way) == hash(copy.deepcopy(way))
    path = tmp_path / "draft.tflite"
    path.write_bytes((files / "small.tflite").read_bytes())
    first = lm._decodings.get(Draft(path))
    assert lm._decodings.get(Draft(str(path))) is first
    path.unlink()
    path.write_bytes((files / "large.tflite").read_bytes())
    assert lm._decodings.get(Draft(path)) is not first
    assert lm._decodings.get(Draft(path))._draft.context_length == CONTEXT


def test_statistics_count_what_is_taken(files, lm, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    start = prompt(5)
    text = lm.generate(start, max_length=20, stop=None)
    way = Draft(files / "large.tflite", 7)
    _, counts = lm.generate(start, stop=text[7], max_length=20, speculative=way, return_stats=True)
    first = text[5:].index(text[7]) + 1
    assert counts.tokens == first and counts.accepted <= first


def test_a_draft_reads_a_conversation_once(files, lm, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    decoding = lm._decodings.get(Draft(files / "small.tflite"))
    start = prompt(20)
    lm.generate(start, max_length=24, stop=None, speculative=Draft(files / "small.tflite"))
    (spare,) = decoding._spare
    assert spare.shared_with(start) >= 20


@pytest.mark.parametrize("spec", [None, Int8(), Int4()], ids=str)
def test_a_file_carries_its_draft_and_what_both_have_once(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("tfgptopt.generation.decoding.Pace", Eager)
    model = make("Llama", hidden_dim=32)
    tokens = np.asarray([prompt(40, seed) for seed in range(4)], np.int32)
    text = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    student = tfgptopt.shrink(model, depth=1, calibration=[(text, tokens)])
    for one in (model, student) if spec else ():
        tfgptopt.quantize(one, spec)
    plain = tfgptopt.export(model, tmp_path / "plain.tflite", TFLite(CONTEXT))
    both = tfgptopt.export(model, tmp_path / "both.tflite", TFLite(CONTEXT), draft=student)
    alone = tfgptopt.export(student, tmp_path / "alone.tflite", TFLite(CONTEXT))
    added = both.stat().st_size - plain.stat().st_size
    held = sum(weight.shape.num_elements() for weight in student.weights)
    assert 0 < added < alone.stat().st_size - held * (1 if spec == Int8() else 0.5)
    lm, start = TFLiteCausalLM(both), prompt(9)
    expected = TFLiteCausalLM(plain).generate(start, stop=None)
    for way in ("auto", Draft(), Draft(alone)):
        found, counts = lm.generate(start, stop=None, speculative=way, return_stats=True)
        assert found == expected and counts.guessed > 0
    assert lm.metadata.draft is not None and lm.metadata.draft.decoder.num_layers == 1
    guesses = [
        lm._decodings.get(way)._draft.decode(lm._decodings.get(way)._draft.new_cache(), 5)
        for way in (Draft(), Draft(alone))
    ]
    np.testing.assert_allclose(*guesses, atol=1e-6)


def test_drafts_that_cannot_be_carried(lm, tmp_path):
    with pytest.raises(ValueError, match="The file carries no draft"):
        lm.generate([1], speculative=Draft())
    model, other = make("GPT2"), make("GPT2", vocabulary_size=100)
    with pytest.raises(ValueError, match="The draft knows 100 tokens"):
        tfgptopt.export(model, tmp_path / "gpt.tflite", draft=other)
    with pytest.raises(ValueError, match="A `draft` is for"):
        tfgptopt.export(model, tmp_path / "saved", draft=model)
    assert not list(tmp_path.iterdir())
