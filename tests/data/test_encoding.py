"""Any tokenizer of KerasHub makes windows, with the ids that it gives a text by itself."""

import io
import json.decoder
from pathlib import Path

import keras_hub
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tfgptopt.data import load_corpus
from tfgptopt.data.encoding import encode_all, encode_texts

TEXT = Path(json.decoder.__file__).read_text("utf-8")


def sentence_piece(**options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in TEXT.splitlines() if line.strip()]),
        model_writer=out,
        vocab_size=300,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return keras_hub.tokenizers.SentencePieceTokenizer(proto=out.getvalue())


@pytest.fixture(scope="module")
def tokenizers(corpus):
    plain, gpt = sentence_piece(), corpus.tokenizer
    prefixed = keras_hub.tokenizers.BytePairTokenizer(
        gpt.vocabulary, gpt.merges, add_prefix_space=True
    )
    rwkv = keras_hub.tokenizers.RWKVTokenizer([f"{i} {bytes([i])!r} 1" for i in range(256)])
    return {
        "byte pairs": gpt,
        "byte pairs with a space before": prefixed,
        "SentencePiece": plain,
        "RWKV": rwkv,
        "bytes": keras_hub.tokenizers.ByteTokenizer(),
        "words": keras_hub.tokenizers.WordPieceTokenizer(["[UNK]", *"abcdef", "def", "##s"]),
    }


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20))
def test_ids_are_those_of_the_tokenizer(tokenizers, texts):
    for name, tokenizer in tokenizers.items():
        expected = [np.asarray(tokenizer.tokenize(text)).tolist() for text in texts]
        found = [ids.tolist() for ids in encode_all(tokenizer, texts)]
        assert found == expected, name


@pytest.mark.parametrize("name", ["SentencePiece", "RWKV", "bytes", "words"])
def test_any_tokenizer_makes_a_corpus(tokenizers, text_files, name):
    tokenizer = tokenizers[name]
    corpus = load_corpus(text_files, tokenizer=tokenizer, sequence_length=16, batch_size=4)
    inputs, labels, weights = next(iter(corpus.train))
    assert inputs["token_ids"].shape == labels.shape == weights.shape == (4, 16)
    assert corpus.training_tokens > 500


def test_a_tokenizer_that_pads_or_gives_strings_is_refused(corpus):
    gpt = corpus.tokenizer
    make = keras_hub.tokenizers.BytePairTokenizer
    with pytest.raises(ValueError, match="pads and cuts texts to 8 tokens"):
        encode_texts(make(gpt.vocabulary, gpt.merges, sequence_length=8), ["text"])
    with pytest.raises(ValueError, match="where a token id is expected"):
        encode_texts(make(gpt.vocabulary, gpt.merges, dtype="string"), ["text"])
