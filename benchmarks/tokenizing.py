"""Speed of tokenizers on text, and what a large vocabulary costs a file.

python benchmarks/tokenizing.py
"""

from __future__ import annotations

import argparse
import io
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras_hub
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as schema

from tfgptopt.data import load_corpus, standard_library, train_tokenizer
from tfgptopt.data.files import total_size

_LOAD = """
import sys, time
def memory():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
from tfgptopt.generation.tokenizing import SentencePiece
proto = open(sys.argv[1], "rb").read()
before, start = memory(), time.perf_counter()
SentencePiece(proto).encode("the first text", False)
print(f"{time.perf_counter() - start:.2f} s, {memory() - before:.0f} MB")
"""


def sentence_piece(kind: str) -> keras_hub.tokenizers.SentencePieceTokenizer:
    """Returns a tokenizer of 8,192 pieces of the standard library."""
    lines = (
        line[:500]
        for file in standard_library()[:120]
        for line in file.path.read_text("utf-8", errors="replace").splitlines()
        if line.strip()
    )
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=out,
        vocab_size=8192,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return keras_hub.tokenizers.SentencePieceTokenizer(proto=out.getvalue())


def large_proto(pieces: int = 262_144) -> bytes:
    """Returns a model of made-up words, as large as Gemma's."""
    generator = random.Random(0)
    kind = schema.ModelProto.SentencePiece
    proto = schema.ModelProto()

    def add(text: str, score: float, type_: int) -> None:
        proto.pieces.add(piece=text, score=score, type=type_)

    for name, type_ in (("<pad>", kind.CONTROL), ("<eos>", kind.CONTROL), ("<bos>", kind.CONTROL)):
        add(name, 0.0, type_)
    add("<unk>", 0.0, kind.UNKNOWN)
    for i in range(256):
        add(f"<0x{i:02X}>", 0.0, kind.BYTE)
    letters = [*"▁abcdefghijklmnopqrstuvwxyz", *map(chr, range(0x4E00, 0x4E00 + 4000))]
    words = dict.fromkeys(letters)
    parts = list(letters)
    while len(words) < pieces - len(proto.pieces):
        word = parts[generator.randrange(27)] + parts[generator.randrange(len(parts))]
        if len(word) < 12 and word not in words:
            words[word] = None
            parts.append(word)
    for i, word in enumerate(words):
        add(word, -float(i), kind.NORMAL)
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback = schema.TrainerSpec.BPE, True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 0, 1, 2, 3
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=400, help="Files of the standard library.")
    arguments = parser.parse_args()
    files = standard_library()[: arguments.files]
    paths, size = [file.path for file in files], total_size(files) / 1e6
    tokenizers = {
        "byte pairs": train_tokenizer(files[:120], 8192),
        "SentencePiece, byte pairs": sentence_piece("bpe"),
        "SentencePiece, unigram": sentence_piece("unigram"),
    }
    print(f"{size:.1f} MB of text")
    for name, tokenizer in tokenizers.items():
        start = time.perf_counter()
        corpus = load_corpus(paths, tokenizer=tokenizer)
        took = time.perf_counter() - start
        print(f"{name}: {size / took:.2f} MB/s ({corpus.training_tokens:,} tokens)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.spm"
        path.write_bytes(large_proto())
        command = [sys.executable, "-c", _LOAD, str(path)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(
            f"A SentencePiece model of 262,144 pieces ({path.stat().st_size / 1e6:.1f} MB): {found}"
        )


if __name__ == "__main__":
    main()
