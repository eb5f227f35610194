import io
import json.decoder
import json.encoder
from pathlib import Path

import keras_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
from decoder.families import FAMILIES

import tfgptopt
from tfgptopt.exporting.tokenizers import end_token_ids, tokenizer_json

IDS = {
    "llama": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "gemma": {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
}
PLAIN = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "required_chars": "<>0x14",
}
MODELS = {
    "byte pairs as Llama": {**PLAIN, **IDS["llama"], "model_type": "bpe", "byte_fallback": True},
    "byte pairs as Gemma": {
        **PLAIN,
        **IDS["gemma"],
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "split_digits": True,
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "▁▁", "▁▁▁▁"],
    },
    "unigram, nmt_nfkc": {"model_type": "unigram", "vocab_size": 400},
    "unigram, bytes": {**PLAIN, "model_type": "unigram", "byte_fallback": True, "vocab_size": 600},
}
TEXT = Path(json.decoder.__file__).read_text("utf-8")


def train(**settings):
    lines = [line for line in TEXT.splitlines() if line.strip()]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        **{"vocab_size": 500, "minloglevel": 2, **settings},
    )
    return out.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_is_stored_with_the_same_tokens(name):
    tokenizer = keras_hub.tokenizers.SentencePieceTokenizer(proto=train(**MODELS[name]))
    stored = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer))
    other = Path(json.encoder.__file__).read_text("utf-8")
    texts = [other, *other.splitlines(), "  naïve  日本 \t🙂 </s><unk>", "▁marks▁", "12345 6"]
    for text in texts:
        ids = np.asarray(tokenizer.tokenize(text)).tolist()
        assert stored.encode(text).ids == ids, text
        assert stored.decode(ids) == tokenizer.detokenize(ids)
    # Any order of tokens, control tokens too, becomes the same text.
    generator = np.random.default_rng(0)
    whole = [i for i, piece in enumerate(tokenizer.get_vocabulary()) if not piece.startswith("<0x")]
    for _ in range(50):
        ids = [int(i) for i in generator.choice(whole, 10)]
        if not MODELS[name].get("remove_extra_whitespaces", True):
            assert stored.decode(ids, skip_special_tokens=False) == tokenizer.detokenize(ids)


def test_what_cannot_be_stored_is_refused():
    proto = train(**MODELS["byte pairs as Llama"])
    tokenizer = keras_hub.tokenizers.SentencePieceTokenizer(proto=proto, add_bos=True)
    with pytest.raises(ValueError, match="gives the same tokens: for 'a' it gives"):
        tokenizer_json(tokenizer)
    words = keras_hub.tokenizers.WordPieceTokenizer(["[UNK]", "a"])
    with pytest.raises(ValueError, match="Cannot store a WordPieceTokenizer"):
        tokenizer_json(words)


def test_a_file_of_a_llama_reads_and_writes_text(tmp_path):
    # Random weights would write bytes that are no UTF-8.
    proto = train(**{**MODELS["byte pairs as Llama"], "byte_fallback": False})
    tokenizer = keras_hub.models.LlamaTokenizer(proto)
    settings = {**FAMILIES["Llama"][1], "vocabulary_size": tokenizer.vocabulary_size()}
    model = keras_hub.models.LlamaCausalLM(
        keras_hub.models.LlamaBackbone(**settings),
        keras_hub.models.LlamaCausalLMPreprocessor(tokenizer, sequence_length=48),
    )
    model.compile(sampler="greedy")
    lm = tfgptopt.TFLiteCausalLM(tfgptopt.export(model, tmp_path / "gpt.tflite"))
    assert lm.context_length == 48
    prompt = "def encode(self, o):"
    assert lm.generate(prompt, max_length=40) == model.generate(prompt, max_length=40)
    assert "".join(lm.stream(prompt, max_length=40)) == lm.generate(
        prompt, max_length=40, strip_prompt=True
    )


def test_generation_stops_at_the_end_of_a_text_and_of_a_turn():
    pieces = {"bos_piece": "<bos>", "eos_piece": "<eos>", "pad_piece": "<pad>"}
    settings = {**MODELS["byte pairs as Gemma"], **pieces}
    gemma = keras_hub.tokenizers.GemmaTokenizer(proto=train(**settings))
    ends = [gemma.id_to_token(token) for token in end_token_ids(gemma)]
    assert ends == [gemma.end_token, "<end_of_turn>"]
    plain = {**settings, "user_defined_symbols": ["<start_of_turn>"]}
    without = keras_hub.tokenizers.GemmaTokenizer(proto=train(**plain))
    assert end_token_ids(without) == [without.end_token_id]
    special = ("begin_of_text", "end_of_text", "eot_id", "start_header_id", "end_header_id")
    names = [*(f"<|{name}|>" for name in special), "a", "b", "ab"]
    vocabulary = {name: i for i, name in enumerate(names)}
    llama = keras_hub.tokenizers.Llama3Tokenizer(vocabulary=vocabulary, merges=["a b"])
    assert end_token_ids(llama) == [1, 2]
    assert end_token_ids(None) == []
