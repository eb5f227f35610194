"""Tables as text."""

from __future__ import annotations

from rich.console import Console, RenderableType


def as_text(renderable: RenderableType) -> str:
    """Returns what rich prints of something in 80 columns."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(renderable)
    text: str = capture.get()
    return text
