"""What the inputs and outputs of a file are called: names that other runtimes look for, too.

Reference: LiteRT-LM finds inputs and caches by these names,
https://github.com/google-ai-edge/LiteRT-LM.
"""

from __future__ import annotations

from tfgptopt.file.metadata import CacheDtype

TOKENS, POSITIONS, MASK, LOGITS = "tokens", "input_pos", "mask", "logits"
KEYS, VALUES = "kv_cache_k", "kv_cache_v"

# The signature that appends positions to the cache of a layer, and what it appends.
GROW, ROOM = "grow", "room"


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
