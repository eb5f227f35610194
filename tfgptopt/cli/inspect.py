"""`tfgptopt inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table

from tfgptopt.cli.shared import console


def inspect(
    file: Annotated[Path, typer.Argument(help="A .tflite or .litertlm file written by tfgptopt.")],
) -> None:
    """Show what a file holds: family, shape, signatures, tokenizer, all that was done to it."""
    from tfgptopt.file.container import read_metadata

    about = read_metadata(file)
    decoder, weights = about.decoder, about.weights
    tokenizer = "none"
    if about.sentencepiece or about.tokenizer:
        tokenizer = "SentencePiece" if about.sentencepiece else "byte pairs"
    signatures = about.signatures
    names = [one.name for one in (signatures.decode, *signatures.prefill, *signatures.score)]
    techniques = cast(list[dict[str, str]], (about.recipe or {}).get("techniques", []))
    done = [one["name"] for one in techniques]
    rows = {
        "file": f"{file.stat().st_size / 1e6:.2f} MB",
        "format": str(about.format_version),
        "made with": ", ".join(f"{name} {version}" for name, version in about.versions.items()),
        "model": f"{about.source.class_name} ({about.source.family})",
        "layers": str(decoder.num_layers),
        "heads": f"{decoder.num_heads} over {decoder.num_key_value_heads} of keys and values, "
        f"{decoder.head_dim} each",
        "vocabulary": f"{decoder.vocabulary_size:,}",
        "context": f"{decoder.context_length:,} tokens, cache of {decoder.cache_dtype}",
        "weights": f"{weights.parameters:,}, {weights.nonzero / weights.parameters:.0%} not zero",
        "signatures": ", ".join(names),
        "tokenizer": tokenizer,
        "chat": "yes" if about.chat else "no",
        "done to it": ", ".join(done) or "nothing",
    }
    table = Table(show_header=False, padding=(0, 1))
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
