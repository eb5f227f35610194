"""Shows what a technique would touch in a model, and what it would skip and why."""

from __future__ import annotations

from typing import Any

import keras
from rich.console import Console
from rich.table import Table

from tfgptopt.model import masks
from tfgptopt.model.targets import Skipped, Target, walk
from tfgptopt.pruning.pruner import zero_share
from tfgptopt.quantization import layers


def _state(target: Target) -> str:
    """Returns how a weight is dressed, in words."""
    words = ["pruned"] if masks.masked(target.variable) else []
    grid = layers.grid_of(target.layer)
    if grid is not None:
        blocks = f"/{grid.block_size}" if grid.block_size else ""
        final = "" if layers.is_dressed(target.layer) else ", final"
        words.append(f"int{grid.bits}{blocks}{final}")
    if target.role != "kernel" and not masks.masked(target.variable):
        words.append("not pruned by default")
    return ", ".join(words) or "plain"


def summary(model: keras.Layer, console: Any = None) -> None:
    """Prints every weight that techniques can act on, its state, and what is skipped and why.

    Args:
        model: A Keras 3 model.
        console: `rich.console.Console`. Defaults to `None`: standard output.

    Example:

    ```python
    tfgptopt.summary(gpt)
    ```
    """
    console = console or Console()
    table = Table(padding=(0, 1))
    table.add_column("weight", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("zeros", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    skipped = Table("skipped", "why", padding=(0, 1))
    for item in walk(model):
        if isinstance(item, Skipped):
            skipped.add_row(item.path, item.reason)
        else:
            shape = " x ".join(str(n) for n in item.variable.shape)
            table.add_row(item.path, shape, f"{zero_share(item):.0%}", _state(item))
    console.print(table)
    if skipped.row_count:
        console.print(skipped)
