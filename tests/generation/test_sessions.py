"""Sessions: equal to reading the whole text afresh, whatever happened before."""

import threading

import keras
import numpy as np
import pytest
from conftest import make_gpt

import tfgptopt
from tfgptopt.generation import TFLiteCausalLM

TURNS = ["import", " re\n", "x ="]


@pytest.fixture(scope="module")
def precise(corpus, tmp_path_factory):
    """A float32 file with a tokenizer and 96 positions."""
    import keras_hub

    keras.utils.set_random_seed(1)  # Or it may say bytes that are no text.
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=96)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor, context=96)
    return TFLiteCausalLM(tfgptopt.export(model, tmp_path_factory.mktemp("export") / "gpt.tflite"))


def afresh(lm, tokens, new):
    """A continuation of tokens by a model that has read nothing before."""
    lm.reset()
    return lm.generate(tokens, max_length=len(tokens) + new, stop=None, strip_prompt=True)


def test_turns_equal_reading_the_whole_text(precise):
    session, text = precise.session(), []
    for turn in TURNS:
        start = [precise._codec.start_token_id] if not text else []
        text += start + precise.tokenize(turn)
        expected = afresh(precise, text, 9)
        session.generate(turn, max_new_tokens=9, stop=None)
        text += expected
        assert session.tokens == text
    session.reset()
    assert session.tokens == []
    again = session.generate(TURNS[0], max_new_tokens=9, stop=None)
    assert again == precise.session().generate(TURNS[0], max_new_tokens=9, stop=None)


def test_a_turn_reads_only_what_is_new(precise, monkeypatch):
    session, read = precise.session(), []
    session.generate("import json\n", max_new_tokens=4, stop=None)
    run = precise._engine._run

    def counted(signature, cache, tokens, position, *rest):
        read.append(position)
        return run(signature, cache, tokens, position, *rest)

    monkeypatch.setattr(precise._engine, "_run", counted)
    before = len(session.tokens)
    session.generate("x = 1", max_new_tokens=4, stop=None)
    assert min(read) == before - 1  # The last token was sampled, and not read yet.


def test_a_fork_goes_its_own_way(precise):
    session = precise.session()
    session.generate("import", max_new_tokens=5, stop=None)
    other, tokens = session.fork(), list(session.tokens)
    first = session.generate(" a", max_new_tokens=6, stop=None)
    second = other.generate(" b", max_new_tokens=6, stop=None)
    for text, made, owner in ((" a", first, session), (" b", second, other)):
        prompt = tokens + precise.tokenize(text)
        assert owner.tokens == prompt + afresh(precise, prompt, 6)
        assert made == precise.detokenize(owner.tokens)[len(precise.detokenize(prompt)) :]


def test_a_broken_stream_leaves_a_usable_session(precise):
    session = precise.session()
    stream = session.stream("import", max_new_tokens=20, stop=None)
    shown = next(stream)
    stream.close()
    tokens = list(session.tokens)
    assert session.text.startswith("import" + shown)
    prompt = tokens + precise.tokenize("\n")
    session.generate("\n", max_new_tokens=5, stop=None)
    assert session.tokens == prompt + afresh(precise, prompt, 5)
    held = session.stream("a", max_new_tokens=9, stop=None)
    next(held)
    session.generate("b", max_new_tokens=2, stop=None)  # Ends the stream that is still open.
    assert list(held) == []


def test_an_interrupt_leaves_a_usable_session(precise, monkeypatch):
    session = precise.session()
    decode, calls = precise._engine.decode, []

    def interrupted(cache, token, *rest):
        calls.append(token)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(cache, token, *rest)

    monkeypatch.setattr(precise._engine, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.generate("import", max_new_tokens=9, stop=None)
    tokens = list(session.tokens)
    assert len(tokens) == 1 + len(precise.tokenize("import")) + 2
    session.generate("\n", max_new_tokens=3, stop=None)
    prompt = tokens + precise.tokenize("\n")
    assert session.tokens == prompt + afresh(precise, prompt, 3)


def test_what_stops_is_not_kept(precise):
    whole = precise.session().generate("import", max_new_tokens=30, stop=None)
    stop = whole[8:11]
    session = precise.session()
    assert session.generate("import", max_new_tokens=30, stop=stop) == whole[: whole.index(stop)]
    assert session.text == "import" + whole[: whole.index(stop)]


def test_bad_turns_leave_the_session_as_it_was(precise):
    session = precise.session()
    session.generate("import", max_new_tokens=4, stop=None)
    tokens = list(session.tokens)
    for call, message in [
        (lambda: session.generate("x = 1\n" * 40), "context has 96"),
        (lambda: session.generate(""), "is empty"),
        (lambda: session.generate([1, 2]), "continues text"),
        (lambda: session.generate("a", max_new_tokens=0), "int >= 1"),
        (lambda: session.generate("a", sampler="beam"), "must be one of"),
        (lambda: session.generate("a", stop=""), "`stop` is"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        assert session.tokens == tokens


def test_a_session_ends_at_the_context(precise):
    session = precise.session()
    session.generate("import", stop=None)
    assert len(session.tokens) == 96
    with pytest.raises(ValueError, match="call `reset\\(\\)`"):
        session.generate("more")


def test_a_second_thread_is_told_to_use_its_own_session(precise, monkeypatch):
    session, inside, go = precise.session(), threading.Event(), threading.Event()
    decode = precise._engine.decode

    def waiting(cache, token, *rest):
        inside.set()
        go.wait(10)
        return decode(cache, token, *rest)

    monkeypatch.setattr(precise._engine, "decode", waiting)
    made = []
    thread = threading.Thread(
        target=lambda: made.append(session.generate("import", max_new_tokens=3, stop=None))
    )
    thread.start()
    assert inside.wait(10)
    with pytest.raises(RuntimeError, match="Another thread is using this session"):
        session.generate("x")
    go.set()
    thread.join()
    assert len(made) == 1
    assert np.size(session.tokens) == 1 + len(precise.tokenize("import")) + 3


def test_a_stream_that_is_left_open_is_part_of_the_text(precise):
    session = precise.session()
    pieces = []
    for piece in session.stream("import", max_new_tokens=12, stop=None):
        pieces.append(piece)
        if len(pieces) == 3:
            break
    tokens = session.tokens
    assert session.text.startswith("import" + "".join(pieces))
    assert session.fork().tokens == tokens  # Which ends the stream.
    assert session.tokens == tokens
