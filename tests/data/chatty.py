"""A SentencePiece tokenizer with Gemma's turns, and a few chats."""

import io
import json.decoder
from pathlib import Path

import keras_hub
import sentencepiece

TEXT = Path(json.decoder.__file__).read_text("utf-8")
CHATS = [
    [
        {"role": "user", "content": f"What is {i} plus {i}?"},
        {"role": "assistant", "content": f"It is {2 * i}."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    for i in range(12)
]


def gemma_proto(vocabulary_size: int = 400) -> bytes:
    out = io.BytesIO()
    lines = [m["content"] for chat in CHATS for m in chat] + TEXT.splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()]),
        model_writer=out,
        vocab_size=vocabulary_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    return out.getvalue()


def gemma_tokenizer():
    return keras_hub.models.GemmaTokenizer(gemma_proto())
