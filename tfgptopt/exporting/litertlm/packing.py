"""Packs the parts of a bundle into a file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tfgptopt.file.bundle import bundle_builder


def write_bundle(
    target: Path,
    model: memoryview,
    tokenizer: str | bytes,
    language: Any,
    executor: Any,
    where: str,
) -> None:
    """Writes a bundle.

    Args:
        target: The file.
        model: The TFLite model.
        tokenizer: JSON, or a SentencePiece model.
        language: What is said of the language model, as a protobuf message.
        executor: Which inputs are caches, as a protobuf message, or `None`.
        where: What may run it: `"cpu"`, or `"gpu,cpu"`.
    """
    library: Any = bundle_builder("litertlm_builder")
    bundle = library.LitertLmFileBuilder()
    # The library copies from files. They stand beside the target, where there is room.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:

        def part(name: str, data: bytes | memoryview) -> str:
            path = Path(scratch) / name
            path.write_bytes(data)
            return str(path)

        bundle.add_llm_metadata(part("llm.pb", language.SerializeToString()))
        if executor is not None:
            bundle.add_executor_metadata(part("executor.pb", executor.SerializeToString()))
        if isinstance(tokenizer, bytes):
            bundle.add_sentencepiece_tokenizer(part("tokenizer.model", tokenizer))
        else:
            bundle.add_hf_tokenizer(part("tokenizer.json", tokenizer.encode()))
        # Without the constraint apps may take the GPU, which computes in half precision.
        bundle.add_tflite_model(
            part("model.tflite", model), library.TfLiteModelType.PREFILL_DECODE, where
        )
        with target.open("wb") as file:
            bundle.build(file, validate_metadata=True)
