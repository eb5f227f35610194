import io
import json.decoder
import json.encoder
from pathlib import Path

import keras_hub
import numpy as np
import pytest
import sentencepiece
from decoder.families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

import tfgptopt
from tfgptopt.data.chats import template_for
from tfgptopt.exporting.tokenizers import end_token_ids, store_tokenizer

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


TEXTS = [
    *Path(json.encoder.__file__).read_text("utf-8").splitlines()[:40],
    Path(json.encoder.__file__).read_text("utf-8"),
    "Hello world",
    " a",
    "a ",
    "a  b",
    "two lines\n\n",
    "\tand\ttabs",
    "ﬁ Ａ ½ ①",
    "  naïve  日本 \t🙂 </s><unk>",
    "▁marks▁",
    "12345 6",
]


def ids_of(tokenizer, text):
    return np.asarray(tokenizer.tokenize(text)).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_is_stored_with_the_same_tokens(name):
    tokenizer = keras_hub.tokenizers.SentencePieceTokenizer(proto=train(**MODELS[name]))
    stored = store_tokenizer(tokenizer).load()
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        assert stored.encode(text, special_tokens=True) == ids, text
        assert stored.decode(ids) == tokenizer.detokenize(ids)
    # Any order of tokens, control tokens too, becomes the same text.
    generator = np.random.default_rng(0)
    for _ in range(50):
        ids = [int(i) for i in generator.integers(0, tokenizer.vocabulary_size(), 10)]
        assert stored.decode(ids) == tokenizer.detokenize(ids)


RULES = ["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"]


def tiny_file(tokenizer, path):
    """Returns the model of a tiny Llama with a tokenizer, read from a file."""
    settings = {**FAMILIES["Llama"][1], "vocabulary_size": tokenizer.vocabulary_size()}
    backbone = keras_hub.models.LlamaBackbone(**settings)
    preprocessor = keras_hub.models.CausalLMPreprocessor(tokenizer, sequence_length=48)
    for name in ("start_token_id", "end_token_id", "pad_token_id"):
        if getattr(tokenizer, name, None) is None:
            setattr(tokenizer, name, 1)
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor)
    return tfgptopt.TFLiteCausalLM(tfgptopt.export(model, path))


@pytest.mark.parametrize("rule", RULES)
def test_any_rule_gives_the_tokens_of_kerashub_for_any_text(rule, tmp_path):
    proto = train(normalization_rule_name=rule, byte_fallback=True, vocab_size=600)
    tokenizer = keras_hub.tokenizers.SentencePieceTokenizer(proto=proto)
    lm = tiny_file(tokenizer, tmp_path / "gpt.tflite")
    for text in TEXTS:
        assert lm.tokenize(text) == ids_of(tokenizer, text), text
    for prompt in ("Hello world", "a ", "a  b", "a\n", "\ta"):
        text = lm.generate(prompt, max_length=20, stop=None)
        assert text == prompt + "".join(lm.stream(prompt, max_length=20, stop=None))
        assert len(lm.score(prompt)) == len(ids_of(tokenizer, prompt))
        session = lm.session()
        made = session.generate(prompt, max_new_tokens=4, stop=None)
        assert session.tokens[1:-4] == ids_of(tokenizer, prompt) and isinstance(made, str)


@pytest.fixture(scope="module")
def pairs_of_tokenizers(corpus):
    """KerasHub's tokenizers and what a file makes of them."""
    made = [
        keras_hub.tokenizers.SentencePieceTokenizer(
            proto=train(normalization_rule_name=rule, byte_fallback=True, vocab_size=600)
        )
        for rule in RULES
    ]
    gpt = corpus.tokenizer
    made += [
        keras_hub.tokenizers.BytePairTokenizer(gpt.vocabulary, gpt.merges, add_prefix_space=prefix)
        for prefix in (False, True)
    ]
    return [(tokenizer, store_tokenizer(tokenizer).load()) for tokenizer in made]


@settings(deadline=None, max_examples=25)
@given(st.text(st.one_of(st.sampled_from(" \t\n▁aB<"), st.characters(exclude_categories=["Cs"]))))
def test_any_text_has_the_ids_of_kerashub(pairs_of_tokenizers, text):
    for tokenizer, stored in pairs_of_tokenizers:
        ids = stored.encode(text, special_tokens=True)
        assert ids == ids_of(tokenizer, text)
        assert stored.encode(text, special_tokens=False) == ids
        assert not stored.lacks(text, ids)


def test_only_an_unknown_token_is_refused(tmp_path):
    tokenizer = keras_hub.tokenizers.SentencePieceTokenizer(proto=train(vocab_size=300))
    lm = tiny_file(tokenizer, tmp_path / "gpt.tflite")
    assert lm.tokenize("def \n main ") == ids_of(tokenizer, "def main")
    for call in (lm.generate, lm.score, lm.session().generate, lm.tokenize):
        with pytest.raises(ValueError, match="characters that the tokenizer's vocabulary lacks"):
            call("漢")


def test_a_byte_pair_tokenizer_with_a_space_before_every_text(corpus, tmp_path):
    gpt = corpus.tokenizer
    for prefix in (True, False):
        tokenizer = keras_hub.models.GPT2Tokenizer(
            gpt.vocabulary, gpt.merges, add_prefix_space=prefix
        )
        lm = tiny_file(tokenizer, tmp_path / f"{prefix}.tflite")
        for text in TEXTS:
            assert lm.tokenize(text) == ids_of(tokenizer, text)
        lacking = {token: i for token, i in gpt.vocabulary.items() if token != "Z"}
        few = keras_hub.models.GPT2Tokenizer(
            {token: i for i, token in enumerate(lacking)}, gpt.merges, add_prefix_space=prefix
        )
        lm = tiny_file(few, tmp_path / f"few{prefix}.tflite")
        with pytest.raises(ValueError, match="vocabulary lacks"):
            lm.generate("a Z")


def test_names_of_special_tokens_in_a_prompt_are_text_unless_asked_for(corpus, tmp_path):
    proto = train(
        **MODELS["byte pairs as Gemma"], bos_piece="<bos>", eos_piece="<eos>", pad_piece="<pad>"
    )
    gemma, text = keras_hub.models.GemmaTokenizer(proto), "a<start_of_turn>b"
    turn = gemma.token_to_id("<start_of_turn>")
    lm = tiny_file(gemma, tmp_path / "gemma.tflite")
    assert lm.tokenize(text, special_tokens=True) == ids_of(gemma, text)
    assert turn in ids_of(gemma, text) and turn not in lm.tokenize(text)
    assert lm.detokenize(lm.tokenize(text)) == text
    assert lm.tokenize("a▁▁b") == ids_of(gemma, "a▁▁b")  # A user-defined piece that is text.
    gpt, text = corpus.tokenizer, "a<|endoftext|>b"
    lm = tiny_file(gpt, tmp_path / "gpt.tflite")
    assert lm.tokenize(text, special_tokens=True) == ids_of(gpt, text)
    assert gpt.end_token_id not in lm.tokenize(text)
    assert lm.detokenize(lm.tokenize(text)) == text
    assert lm.generate(text, 40, stop=None).startswith(text)
    ids = len(lm.score(text)), len(lm.score(text, special_tokens=True))
    assert ids[0] > ids[1] == 3


def test_what_cannot_be_stored_is_refused():
    proto = train(**MODELS["byte pairs as Llama"])
    tokenizer = keras_hub.tokenizers.SentencePieceTokenizer(proto=proto, add_bos=True)
    with pytest.raises(ValueError, match="gives the same tokens: for 'a' it gives"):
        store_tokenizer(tokenizer)
    words = keras_hub.tokenizers.WordPieceTokenizer(["[UNK]", "a"])
    with pytest.raises(ValueError, match="Cannot store a WordPieceTokenizer"):
        store_tokenizer(words)


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
    turned = {**settings, "user_defined_symbols": ["<|turn>", "<turn|>"]}
    gemma4 = keras_hub.tokenizers.Gemma4Tokenizer(
        proto=train(**turned), has_vision_tokens=False, has_video_tokens=False
    )
    ends = [gemma4.id_to_token(token) for token in end_token_ids(gemma4)]
    assert ends == [gemma4.end_token, "<turn|>"]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? "}]
    written = template_for(gemma4).render(chat, add_generation_prompt=True)
    assert (
        written == "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n"
    )
    plain = {**settings, "user_defined_symbols": ["<start_of_turn>"]}
    without = keras_hub.tokenizers.GemmaTokenizer(proto=train(**plain))
    assert end_token_ids(without) == [without.end_token_id]
    special = ("begin_of_text", "end_of_text", "eot_id", "start_header_id", "end_header_id")
    names = [*(f"<|{name}|>" for name in special), "a", "b", "ab"]
    vocabulary = {name: i for i, name in enumerate(names)}
    llama = keras_hub.tokenizers.Llama3Tokenizer(vocabulary=vocabulary, merges=["a b"])
    assert end_token_ids(llama) == [1, 2]
    assert end_token_ids(None) == []
