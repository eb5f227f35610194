"""Continuations have the form that is asked for, whatever the model would rather say."""

import json
import re
import sys

import numpy as np
import pytest
from data.chatty import gemma_proto

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.generation import Grammar, JsonSchema, NGram, Regex, TFLiteCausalLM, TopK

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "integer", "maximum": 99}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def byte_pairs(trained, tmp_path_factory):
    return TFLiteCausalLM(tfgptopt.export(trained, tmp_path_factory.mktemp("c") / "gpt.tflite"))


@pytest.fixture(scope="module")
def sentence_pieces(tmp_path_factory):
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone(400, 1, 2, 1, 16, 32, 8)
    tokenizer = keras_hub.models.GemmaTokenizer(gemma_proto())
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=64)
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=preprocessor)
    path = tmp_path_factory.mktemp("c") / "gemma.tflite"
    return TFLiteCausalLM(tfgptopt.export(model, path, TFLite(64)))


@pytest.fixture(params=["byte_pairs", "sentence_pieces"])
def lm(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("sampler", ["greedy", TopK(50)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("speculative", [None, NGram(min_ngram=1)], ids=["plain", "guessing"])
def test_a_regular_expression_is_matched_whole(lm, sampler, speculative):
    for seed in range(4):
        text = lm.generate(
            "x", sampler=sampler, seed=seed, strip_prompt=True, speculative=speculative,
            constraint=Regex(r"(yes|no|[0-9]{2,4}) [a-c]+d"), max_length=28,
        )  # fmt: skip
        whole = re.fullmatch(r"(yes|no|[0-9]{2,4}) [a-c]+d", text)
        assert whole or re.fullmatch(r"(yes|no|[0-9]{2,4}) [a-c]*", text), text


def test_json_of_a_schema(lm):
    seen = set()
    for seed in range(6):
        text = lm.generate("It is ", sampler=TopK(50), seed=seed, strip_prompt=True,
                           max_length=32, constraint=JsonSchema(SCHEMA, compact=True))  # fmt: skip
        if not text.endswith("}"):
            continue  # Cut off by the length.
        found = json.loads(text)
        assert set(found) == {"a", "b"} and found["b"] <= 99 and " " not in text
        seen.add(found["a"])
    assert seen and seen <= {"x", "y"}
    pieces = list(lm.stream("It is ", constraint=JsonSchema(json.dumps(SCHEMA)), max_length=32))
    assert "".join(pieces) == lm.generate("It is ", constraint=JsonSchema(SCHEMA), max_length=32,
                                          strip_prompt=True)  # fmt: skip


def test_a_grammar_and_guesses(byte_pairs):
    # At most three deep, so that whatever the model prefers is complete within its context.
    grammar = Grammar('start: "(" one ")"\none: "a" | "(" two ")"\ntwo: "a" | "(a)"')
    for way in (None, NGram(min_ngram=1)):
        text = byte_pairs.generate("((((", strip_prompt=True, constraint=grammar, speculative=way)
        inside = text.strip("()")
        assert inside == "a" and text == "(" * text.count("(") + "a" + ")" * text.count("(")


def test_all_else_is_as_without(byte_pairs):
    anything = Regex(r"(?s:.*)")
    free = byte_pairs.generate("import", max_length=20, strip_prompt=True)
    assert byte_pairs.generate("import", max_length=20, constraint=anything,
                               strip_prompt=True) == free  # fmt: skip
    stopped = byte_pairs.generate("import", max_length=20, constraint=anything, stop=free[3:5],
                                  strip_prompt=True)  # fmt: skip
    assert stopped == free.split(free[3:5])[0]
    several = byte_pairs.generate(["a", "b"], max_length=8, constraint=Regex("[0-9]+"))
    assert all(re.fullmatch("[ab][0-9]*", text) for text in several)


def test_bytes_of_pieces_are_what_they_add_to_a_text(sentence_pieces):
    tokenizer = sentence_pieces._codec.tokenizer
    found, special = tokenizer.bytes_of_tokens()
    for text in ("def x(self):", "  é 漢 ", "a\nb"):
        ids = tokenizer.encode(text, special_tokens=False)
        assert b"".join(found[i] for i in ids) == text.encode()
    assert {0, 1, 2, 3} <= set(special) and np.max(special) < 400


def test_bad_constraints_say_what_is_wrong(byte_pairs, gpt, tmp_path, monkeypatch):
    for make, message in (
        (lambda: Regex("a(b"), "Regex cannot be held to: .*unclosed group"),
        (lambda: JsonSchema("{"), "EOF"),
        (lambda: JsonSchema(3), "`schema` must be a dictionary or text"),
        (lambda: JsonSchema({"type": "objct"}), "JsonSchema cannot be held to"),
        (lambda: Grammar("begin: 'a'"), "Grammar cannot be held to"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for stop in (None, 5):
        with pytest.raises(ValueError, match="A constraint is complete at the end token"):
            byte_pairs.generate("a", stop=stop, constraint=Regex("a"))
    bare = TFLiteCausalLM(tfgptopt.export(gpt, tmp_path / "bare.tflite"))
    with pytest.raises(ValueError, match="end token"):
        bare.generate([1, 2], constraint=Regex("a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'tfgptopt\[constraints\]'"):
        Regex("a")


@pytest.mark.parametrize("speculative", [None, "auto"])
def test_a_turn_of_a_session_or_chat_has_a_form(lm, speculative):
    session = lm.session(speculative)
    answer = session.generate("x", constraint=Regex("(yes|no)[0-9]"))
    assert re.fullmatch("(yes|no)[0-9]", answer)
    free = session.generate(" so ", max_new_tokens=3)  # The form was of that turn.
    assert session.text == "x" + answer + " so " + free
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    chat = lm.chat(template=turns, speculative=speculative)
    for _ in range(2):
        said = chat.generate("say", constraint=Regex("a[bc]"), sampler=TopK(20), seed=1)
        assert said in ("ab", "ac") and chat.messages[-1]["content"] == said
    for turn in (session, chat):
        with pytest.raises(ValueError, match="complete at the end token"):
            turn.generate("x", stop=None, constraint=Regex("a"))
