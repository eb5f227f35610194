"""Fewer tokens: any text still encodes, frequent tokens stay, ids and rows fit together."""

import keras_hub
import numpy as np
import pytest
import sentencepiece
from conftest import CONTEXT, make_gpt
from decoder.families import make

import tfgptopt
from tfgptopt.shrinking import shape_of

HARD = "naïve façade — Ελληνικά 日本語 🙂\n\tdef f(x): return x**2  # <|endoftext|"


@pytest.fixture(scope="module")
def model(corpus):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=CONTEXT
    )
    return make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)


def test_byte_pairs(model, corpus):
    batches = list(corpus.train.take(4).as_numpy_iterator())
    tokens = np.concatenate([batch[0]["token_ids"].reshape(-1) for batch in batches])
    small = tfgptopt.shrink(model, vocabulary=275, calibration=corpus.train.take(4))
    old, new = corpus.tokenizer, small.preprocessor.tokenizer
    assert shape_of(small).vocabulary == new.vocabulary_size() == 275
    assert small.preprocessor.sequence_length == CONTEXT
    for text in (HARD, "import os\n", ""):
        assert new.detokenize(new.tokenize(text)) == text
    assert new.id_to_token(new.end_token_id) == "<|endoftext|>"
    # The most frequent pair stays, and each token has what it is merged from.
    pairs = [i for i in range(old.vocabulary_size()) if len(old.id_to_token(i)) == 2]
    assert old.id_to_token(max(pairs, key=lambda i: (tokens == i).sum())) in new.vocabulary
    for token in new.vocabulary:
        if len(token) > 1 and token != "<|endoftext|>":
            ways = [(token[:i], token[i:]) for i in range(1, len(token))]
            assert any(f"{a} {b}" in new.merges for a, b in ways)
    # The row of a token came along with it.
    table, shrunk = (np.asarray(m.backbone.token_embedding.embeddings) for m in (model, small))
    for token, i in new.vocabulary.items():
        np.testing.assert_array_equal(shrunk[i], table[old.vocabulary[token]])
    small.compile(sampler="greedy")
    assert small.generate("import", max_length=12).startswith("import")


def test_logits_of_tokens_that_stay(model, corpus):
    small = tfgptopt.shrink(model, vocabulary=280, calibration=corpus.train.take(2))
    old, new = corpus.tokenizer, small.preprocessor.tokenizer
    found, wanted = (
        np.asarray(
            each(
                {
                    "token_ids": np.array([[t.token_to_id(c) for c in "import"]]),
                    "padding_mask": np.ones((1, 6), np.int32),
                }
            )
        )
        for each, t in ((small, new), (model, old))
    )
    places = [old.vocabulary[new.id_to_token(i)] for i in range(280)]
    np.testing.assert_allclose(found, wanted[..., places], atol=1e-5)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("fallback", [True, False])
def test_sentence_pieces(kind, fallback, text_files, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(str(path) for path in sorted(text_files.iterdir())),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=420,
        model_type=kind,
        byte_fallback=fallback,
        hard_vocab_limit=False,
    )
    tokenizer = keras_hub.models.LlamaTokenizer((tmp_path / "sp.model").read_bytes())
    size = tokenizer.vocabulary_size()
    model = make("Llama3", vocabulary_size=size + 5)  # A table with spare rows.
    model.preprocessor = keras_hub.models.LlamaCausalLMPreprocessor(tokenizer, sequence_length=24)
    text = "def scan_once(string, idx): return decode(string)"
    small = tfgptopt.shrink(model, vocabulary=size - 30, calibration=[text] * 3)
    new = small.preprocessor.tokenizer
    assert new.vocabulary_size() == size - 30 == shape_of(small).vocabulary
    assert len(new.tokenize(text)) <= 1.1 * len(tokenizer.tokenize(text))
    for probe in ("raise JSONDecodeError", "日本 🙂" if fallback else "x"):
        assert new.detokenize(new.tokenize(probe)) == probe
    assert new.start_token_id == tokenizer.start_token_id
    assert new.end_token_id == tokenizer.end_token_id


def test_too_few_tokens(model, corpus):
    for size in (100, 257):
        with pytest.raises(ValueError, match="at least 258"):
            tfgptopt.shrink(model, vocabulary=size, calibration=corpus.train.take(1))
    small = tfgptopt.shrink(model, vocabulary=258, calibration=corpus.train.take(1))
    tokenizer = small.preprocessor.tokenizer
    assert tokenizer.detokenize(tokenizer.tokenize(HARD)) == HARD


def test_positions_shorten_the_preprocessor(model):
    small = tfgptopt.shrink(model, context=8)
    assert small.preprocessor.sequence_length == 8
    assert model.preprocessor.sequence_length == CONTEXT
