"""Records from files and from Python: what becomes of them, and what is refused."""

import json
import sys

import numpy as np
import pyarrow
import pytest
import tensorflow as tf
from data.chatty import CHATS, gemma_tokenizer
from pyarrow import parquet

from tfgptopt.data import ChatTemplate, load_corpus
from tfgptopt.data.chats import written_turns
from tfgptopt.generation.templates import KNOWN

PAIRS = [{"prompt": f"{i} and {i}", "response": f"{2 * i}"} for i in range(10)]


@pytest.fixture(scope="module")
def gemma():
    return gemma_tokenizer()


def lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    return path


def load(source, gemma, length=96, **options):
    return load_corpus(source, tokenizer=gemma, sequence_length=length, batch_size=2, **options)


def rows(dataset):
    """The rows of a dataset: tokens, and which of them are learned."""
    found = []
    for inputs, labels, weights in dataset.as_numpy_iterator():
        for ids, mask, row, weight in zip(
            inputs["token_ids"], inputs["padding_mask"], labels, weights, strict=True
        ):
            size = int(mask.sum())
            full = [int(ids[0]), *row[: size - 1].tolist()]
            assert full == ids[:size].tolist()
            if weight[size - 1] or row[size - 1]:
                full.append(int(row[size - 1]))
            found.append((full, [int(row[i]) for i in range(len(weight)) if weight[i]]))
    return found


def test_chats_have_a_row_each_and_answers_are_learned(tmp_path, gemma):
    corpus = load(lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS]), gemma)
    assert corpus.training_records + corpus.validation_records == len(CHATS)
    (full, learned), *_ = rows(corpus.validation)
    text = KNOWN["gemma"].render(CHATS[1]).removeprefix("<bos>")
    assert full == [gemma.start_token_id, *np.asarray(gemma.tokenize(text)).tolist()][: len(full)]
    assert gemma.detokenize(learned) == "It is 2.<end_of_turn>Yes.<end_of_turn>"
    assert corpus.cut_records == corpus.cut_tokens == 0
    again = load([{"messages": chat} for chat in CHATS], gemma)
    assert rows(again.train) == rows(corpus.train)


def test_prompts_are_joined_as_kerashub_does_or_written_by_a_template(gemma):
    corpus = load(PAIRS, gemma, 24)
    (full, learned), *_ = rows(corpus.validation)
    prompt, response = (np.asarray(gemma.tokenize(text)).tolist() for text in ("1 and 1", "2"))
    assert full == [gemma.start_token_id, *prompt, *response, gemma.end_token_id]
    assert learned == [*response, gemma.end_token_id]
    corpus = load(PAIRS, gemma, 64, chat_template="gemma")
    (_, learned), *_ = rows(corpus.validation)
    assert gemma.detokenize(learned) == "2<end_of_turn>"


class Frame:
    """What is used of a pandas frame."""

    columns = ("prompt", "response")

    def itertuples(self, index, name):
        return ((pair["prompt"], pair["response"]) for pair in PAIRS)


def test_any_source_of_python_gives_the_same(gemma, tmp_path):
    columns = {
        "prompts": [p["prompt"] for p in PAIRS],
        "responses": [p["response"] for p in PAIRS],
    }
    whole = tmp_path / "pairs.json"
    whole.write_text(json.dumps(PAIRS, indent=1), "utf-8")
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    expected = rows(load(PAIRS, gemma, 24).train)
    for source in (columns, iter(PAIRS), Frame(), dataset, dataset.batch(3), whole):
        assert rows(load(source, gemma, 24).train) == expected


def test_texts_are_packed(gemma, tmp_path):
    texts = [f"def main_{i}():\n    return {i}\n" for i in range(40)]
    path = lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    expected = load(path, gemma, 16)
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(7)
    for source in (iter(texts), dataset, np.asarray(texts, object)):
        assert rows(load(source, gemma, 16).train) == rows(expected.train)
    _, _, weights = next(iter(expected.train))
    assert float(tf.reduce_mean(weights)) == 1.0
    assert "40" not in expected.describe() and "held out" in expected.describe()


def test_a_chat_that_is_too_long_is_cut_counted_and_said(gemma):
    chats = [{"messages": chat} for chat in CHATS]
    chats[3] = {"messages": [{"role": "user", "content": "x" * 300}, CHATS[3][1]]}
    corpus = load(chats, gemma, 96)
    assert corpus.cut_records == corpus.dropped_records == 1 and corpus.cut_tokens > 200
    assert "1 records were longer than 97 tokens" in corpus.describe()
    assert corpus.training_records + corpus.validation_records == len(CHATS) - 1
    with pytest.raises(ValueError, match="None of the 12 conversations has an answer within 7"):
        load([{"messages": chat} for chat in CHATS], gemma, 6)


USER = {"role": "user", "content": "a"}
BAD = [
    ('{"text": "a"}\n{"text": \n', r"line 2 is no JSON"),
    ('{"text": "a"}\n{"messages": [{"role": "bot", "content": ""}]}', "role 'bot' is unknown"),
    (
        '{"text": "a"}\n{"prompt": "a", "response": "b"}',
        "line 2 is prompt and response, and .*text",
    ),
    ('{"prompt": "a", "response": " "}', "line 1: the 'response' is empty"),
    ('{"prompt": "a"}', r"expected 'text', .* Received the fields \['prompt'\]"),
    ('{"messages": []}', "line 1: there are none"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
    ('{"messages": [{"role": "user"}]}', "a message has 'role' and 'content'"),
    ('{"messages": "hello"}', "expected a list of role and content"),
    ("[1, 2]", "expected a text or"),
    ("", "is empty: it has no records"),
    ('{"text": "a"}', "at least two are needed"),
    ('{"text": "a"}\n{"text": "b"}', "one window needs 97"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_records_are_one_sentence(tmp_path, gemma, text, words):
    path = tmp_path / "data.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=words):
        load(path, gemma)


def test_bad_sources(tmp_path, gemma, corpus):
    path = lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    (tmp_path / "read.txt").write_text("text", "utf-8")
    for source, words in [
        (tmp_path, "give one kind of source"),
        ({"train": PAIRS}, "A dictionary has lists of one length"),
        ({"text": "abc"}, "A dictionary has lists of one length"),
        (["one text\n", "two"], "A text is no name of a file: 'one text"),
        (7, "an iterable of texts or dictionaries. Received: int"),
        ([{"messages": [{"role": "assistant", "content": "a"}, USER]}] * 3, "refuses the messages"),
    ]:
        with pytest.raises(ValueError, match=words):
            load(source, gemma)
    with pytest.raises(ValueError, match="Records need a tokenizer"):
        load(path, None)
    with pytest.raises(ValueError, match="no known template for a GPT2Tokenizer"):
        load(path, corpus.tokenizer)
    with pytest.raises(ValueError, match=r"does not compile: .* \(line 2\)"):
        load(path, gemma, chat_template="{{ bos_token }}\n{% for m in messages %}")
    with pytest.raises(ValueError, match="A chat template is one of gemma, gemma4, llama3"):
        load(path, gemma, chat_template="vicuna")


def test_parquet(tmp_path, gemma, monkeypatch):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'tfgptopt\[parquet\]'"):
        load(path, gemma)
    monkeypatch.undo()
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    assert rows(load(path, gemma, 24).train) == rows(load(PAIRS, gemma, 24).train)


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer():
    # As those do that leave out what a model thought before.
    source = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and loop.last %}thought {% endif %}{{ m.content }}."
        "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = written_turns(ChatTemplate(source), CHATS[1])
    assert len(found) == 2
    assert found[1] == [
        ("[user]What is 1 plus 1?.[assistant]It is 2..[user]Sure?.[assistant]", False),
        ("thought Yes..", True),
    ]
    with pytest.raises(ValueError, match="in another way once the answer is there"):
        written_turns(ChatTemplate("{{ messages | length }}{{ messages[0].content }}"), CHATS[1])


def test_all_of_the_records_can_be_held_out(gemma):
    one = load(PAIRS[:1], gemma, 24, validation_share=1.0)
    assert (one.training_records, one.validation_records) == (0, 1)
    everything = load(PAIRS, gemma, 24, validation_share=1.0)
    both = load(PAIRS, gemma, 24, validation_share=0.5)
    # Training batches drop what does not fill one: ten records, in batches of two.
    assert len(rows(everything.validation)) == len(PAIRS)
    assert all(row in rows(everything.validation) for row in rows(both.validation))
    assert everything.describe().startswith("Text: 10 records")
    with pytest.raises(ValueError, match=r"None of the 10 conversations has an answer within 3"):
        load(PAIRS, gemma, 2, validation_share=1.0)
