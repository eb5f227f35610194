"""Text from tokens: whole characters, and stop texts across borders of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfgptopt.generation.codec import Stop
from tfgptopt.generation.continuing import Continuation, StopFinder, TextDecoder

letters = st.text("ab", max_size=12)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_is_found_wherever_the_pieces_end(pieces, stops):
    finder, shown, found = StopFinder(stops), "", False
    text = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    for piece in pieces:
        part, found = finder.add(piece)
        shown += part
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if found:
            break
    assert found == bool(ends)
    if not found:
        assert shown + finder.held == text
        return
    # With stops of several lengths, an earlier piece may end one that begins later.
    assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_a_part_of_a_stop_is_held_until_it_is_sure():
    finder = StopFinder(["###", "\n\n"])
    assert finder.add("one #") == ("one ", False)
    assert finder.add("#") == ("", False)
    assert finder.add("4\n") == ("##4", False)
    assert finder.held == "\n"
    assert finder.add("\nmore") == ("", True)


def test_only_whole_characters_are_shown(lm):
    decoder = TextDecoder(lm._codec, lm.tokenize("x = "))
    shown = [decoder.add(token) for token in lm.tokenize("é漢🙂!")]
    assert "".join(shown) == "é漢🙂!" and "\ufffd" not in "".join(shown)
    assert [piece for piece in shown if piece] == ["é", "漢", "🙂", "!"]
    assert decoder.add(lm.tokenize("漢")[0]) == "" and not decoder.whole
    assert decoder.rest() == "\ufffd"


def test_a_last_character_that_is_not_whole_is_shown_by_streams_too(lm, monkeypatch):
    half = lm.tokenize("a漢")[:-1]
    made = Continuation(lm._codec, lm.tokenize("x"), Stop())
    assert "".join(made.pieces(iter(half))) == "a\ufffd"
    found = Continuation(lm._codec, lm.tokenize("x"), Stop(texts=("\ufffd",)))
    assert "".join(found.pieces(iter(half))) == "a"
    logits = np.eye(lm.vocabulary_size, dtype=np.float32)[half]

    def decode(cache, token, *rest):
        cache.tokens.append(token)
        return logits[max(0, len(cache.tokens) - 2)]  # Behind the start token and "x".

    monkeypatch.setattr(lm._engine, "decode", decode)
    length = 2 + len(half)
    lm.reset()
    streamed = "".join(lm.stream("x", max_length=length, stop=None))
    lm.reset()
    assert streamed == lm.generate("x", max_length=length, strip_prompt=True, stop=None)
    assert streamed == lm.session().generate("x", max_new_tokens=len(half), stop=None)
    assert streamed == "a\ufffd"
    lm.reset()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("import re\nclass", "\ncl", "import re"),
        ("import re\nclass", "t r", "impor"),
        ("import re\nclass", "import", ""),
        ("é漢🙂!", "漢", "é"),
        ("import re", "#", "import re"),
    ],
)
def test_tokens_and_tail_are_what_lies_before_the_stop(lm, text, stop, expected):
    tokens = lm.tokenize(text)
    made = Continuation(lm._codec, lm.tokenize("x\n"), Stop(texts=(stop,)))
    assert "".join(made.pieces(iter(tokens))) == expected
    assert lm.detokenize(made.tokens) + made.tail == expected
    assert made.tokens == tokens[: len(made.tokens)]


def test_generate_and_stream_stop_at_a_text(lm):
    prompt = "def scan(\n"
    whole = lm.generate(prompt, max_length=32, strip_prompt=True, stop=None)
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    assert lm.generate(prompt, max_length=32, strip_prompt=True, stop=stop) == expected
    assert "".join(lm.stream(prompt, max_length=32, stop=[stop])) == expected
    ids = lm.generate(lm.tokenize(prompt), max_length=31, stop=stop)
    assert stop not in lm.detokenize(ids[len(lm.tokenize(prompt)) :])


def test_a_special_token_stops_by_its_text(lm):
    end = min(lm._codec.end_token_ids)
    (name,) = [name for name, token in lm._codec.tokenizer.specials.items() if token == end]
    assert lm._codec.stop([name, 7]).ids == {end, 7}
    assert lm._codec.stop("###").ids == {end}
    assert lm._codec.stop([7]).ids == {7}
    assert lm._codec.stop(None).ids == set()
