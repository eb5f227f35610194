import numpy as np
import pytest

from tfgptopt.data import find_files, load_corpus, train_tokenizer
from tfgptopt.data.files import BadBytes, read_pieces


def rows(dataset):
    return [
        tuple(map(np.copy, (x["token_ids"], x["padding_mask"], y, w)))
        for x, y, w in dataset.as_numpy_iterator()
    ]


def test_windows_hold_the_text_in_order_once(corpus):
    text = "".join(
        "".join(read_pieces(f, BadBytes())) + "<|endoftext|>" for f in corpus.validation_files
    )
    tokens = []
    for ids, mask, labels, weights in rows(corpus.validation):
        assert ids.dtype == mask.dtype == labels.dtype == np.int32
        for row, row_labels, weight in zip(ids, labels, weights, strict=True):
            real = int(weight.sum())
            np.testing.assert_array_equal(row[1:real], row_labels[: real - 1])
            tokens += ([int(row[0])] if not tokens else []) + row_labels[:real].tolist()
    assert len(tokens) == corpus.validation_tokens
    assert corpus.tokenizer.detokenize(tokens) == text


def test_order_is_shuffled_and_the_same_each_time(corpus):
    first, again = rows(corpus.train), rows(corpus.train)
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
    seen = {row.tobytes() for batch in first for row in batch[0]}
    second_epoch = rows(corpus.train.repeat(2))[len(first) :]
    assert not np.array_equal(first[0][0], second_epoch[0][0])
    assert len(seen & {row.tobytes() for batch in second_epoch for row in batch[0]}) > 0.9 * len(
        seen
    )


def test_tokenizer_encodes_any_text_and_ends_where_gpt2_does(corpus):
    tokenizer = corpus.tokenizer
    text = "def ünïcode(🙂):\n\treturn '漢字'\0"
    assert tokenizer.detokenize(tokenizer(text)) == text
    # KerasHub pads with token 0: an end token there would end every prompt at once.
    assert tokenizer.end_token_id == tokenizer.vocabulary_size() - 1


def test_a_given_tokenizer_is_used(corpus, text_files):
    other = load_corpus(text_files, tokenizer=corpus.tokenizer, sequence_length=8, batch_size=2)
    assert other.tokenizer is corpus.tokenizer


def test_bad_bytes_are_counted(tmp_path, corpus):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_bytes(b"good text \xff\xfe more good text\n" * 30)
    found = load_corpus(tmp_path, tokenizer=corpus.tokenizer, sequence_length=8, batch_size=2)
    assert found.bad_bytes == 120


def test_bad_input(tmp_path, corpus):
    (tmp_path / "short.txt").write_text("short\n", "utf-8")
    with pytest.raises(ValueError, match=r"has \d+ tokens, and one window needs 129"):
        load_corpus(tmp_path, tokenizer=corpus.tokenizer)
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(find_files(tmp_path), 100)
    with pytest.raises(ValueError, match="`batch_size` must be an int >= 1"):
        load_corpus(tmp_path, batch_size=0)


def test_all_of_the_text_can_be_held_out(text_files, corpus):
    file = text_files / "scanner.py"
    whole = load_corpus(
        file, tokenizer=corpus.tokenizer, sequence_length=8, batch_size=1, validation_share=1.0
    )
    tokens = np.asarray(corpus.tokenizer(file.read_text("utf-8"))).tolist()
    got = [int(t) for inputs, _, _ in whole.validation for t in inputs["token_ids"][0]]
    assert got[: len(tokens) - 1] == tokens[:-1] and whole.training_tokens == 0
    with pytest.raises(ValueError, match="nothing to train on"):
        whole.train  # noqa: B018
    with pytest.raises(ValueError, match="give `tokenizer`"):
        load_corpus(file, validation_share=1.0)
