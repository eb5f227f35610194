"""What the inputs and outputs of a file are called: names that other runtimes look for, too.

Reference: LiteRT-LM finds inputs and caches by these names,
https://github.com/google-ai-edge/LiteRT-LM.
"""

from __future__ import annotations

import math

from tfgptopt.file.metadata import CacheDtype

TOKENS, POSITIONS, MASK, LOGITS = "tokens", "input_pos", "mask", "logits"
# The position of the first row that caches of layers with a window hold.
WINDOW_START = "window_start"
KEYS, VALUES = "kv_cache_k", "kv_cache_v"

# The signature that appends positions to the cache of a layer, and what it appends.
GROW, ROOM = "grow", "room"

# What the signatures of a smaller model in the same file begin with.
DRAFT = "draft"

# The signature that puts the cache of one text, of a layer, into that of a batch.
PLACE, TEXT, START = "place", "text", "start"
# One that gives texts of a batch some rows of others.
PARENTS, ROWS = "parents", "rows"


def parts_of(name: str, dtype: CacheDtype) -> tuple[str, ...]:
    """Returns the parts of keys, values or room: the rows, and for int8 their scales.

    Args:
        name: `KEYS`, `VALUES` or `ROOM`.
        dtype: Of the cache.
    """
    return (name, f"{name}_scale") if dtype == "int8" else (name,)


def in_layer(part: str, layer: int) -> str:
    """Returns the name that a part of the cache has in signatures with all layers."""
    return f"{part}_{layer}"


def of_text(name: str, text: int) -> str:
    """Returns the name of a cache to which so many texts of a batch, and this one, were added."""
    return f"{name}_{TEXT}_{text}"


def of_all_texts(name: str) -> str:
    """Returns the name of the cache that `of_text` gave a name, or that has this name."""
    return name.split(f"_{TEXT}_")[0]


def moved_rows(context_length: int) -> int:
    """Returns how many rows are moved at once: every cache has a multiple of them.

    Texts that were one a few tokens ago have few rows of their own.
    """
    return math.gcd(4, context_length)


def window_positions(window: int, chunk: int) -> int:
    """Returns how many positions a cache of a layer with a window has at most.

    A chunk is read behind the window, and may step back by as much; the rest is room, so that rows
    are moved to the front now and then only.

    Args:
        window: Positions that a token sees.
        chunk: Most tokens that are read in one call.
    """
    return -(-(window + 3 * chunk) // 128) * 128


def reorder_of(size: int) -> str:
    """Returns the name of the signature that reorders the texts of a batch."""
    return f"reorder_{size}"
