"""Tables as text."""

from __future__ import annotations

import re

from rich.console import Console, RenderableType


def across_layers(path: str) -> str:
    """Returns a path with the numbers of layers as stars: `decoder_block_3/query` as
    `decoder_block_*/query`, so that what stands in each layer makes one row of a table."""
    return re.sub(r"_\d+(?=/)", "_*", path)


def as_text(renderable: RenderableType) -> str:
    """Returns what rich prints of something in 80 columns."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(renderable)
    text: str = capture.get()
    return text
