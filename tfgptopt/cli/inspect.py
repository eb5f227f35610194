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
    from tfgptopt.file.container import read_container

    container = read_container(file)
    about = container.metadata
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
        "layers with a cache": str(decoder.num_layers),
        "heads of the first": f"{decoder.num_heads} over {decoder.num_key_value_heads} of keys and "
        f"values, {decoder.head_dim} each",
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
    console.print(_parts_table(file, container.model.begin if container.model else 0))


def _parts_table(file: Path, begin: int) -> Table:
    """Returns what takes the bytes of a file."""
    from tfgptopt.file.contents import parts_of

    parts, size = parts_of(file, begin), file.stat().st_size
    table = Table(padding=(0, 1))
    table.add_column("part", overflow="fold")
    table.add_column("type")
    for heading in ("count", "numbers", "bits", "MB", "share"):
        table.add_column(heading, justify="right")
    for part in parts:
        table.add_row(
            part.name,
            part.number,
            str(part.count),
            f"{part.elements:,}",
            f"{part.bits:.2f}",
            f"{part.size / 1e6:.2f}",
            f"{part.size / size:.0%}",
        )
    rest = size - sum(part.size for part in parts)
    table.add_row("graph, tokenizer, metadata", "", "", "", "", f"{rest / 1e6:.2f}",
                  f"{rest / size:.0%}")  # fmt: skip
    return table
