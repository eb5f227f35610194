"""Searches the shape of a smaller model for a budget."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfgptopt.model.types import Data
from tfgptopt.shrinking.families import family_of, period_of
from tfgptopt.shrinking.importance import Importance, next_token_loss, read_data
from tfgptopt.shrinking.shapes import Shape, count_parameters, shape_of
from tfgptopt.terminal.progress import stage, track

# Shapes that are built and compared by their loss, of those that keep most importance.
_COMPARED = 6
_WIDTHS = 8
_BISECTIONS = 4
_NEW_TOKENS = 48

Make = Callable[[Any, Shape, Importance], Any]


def _smaller_heads(model: keras.Model) -> list[Shape]:
    """Returns the model's shape with fewer heads, and less width where they go together."""
    family, old = family_of(model), shape_of(model)
    groups = range(max(1, old.kv_heads // 2), old.kv_heads + 1)
    found = []
    for kv_heads in groups:
        heads = kv_heads * (old.heads // old.kv_heads)
        if family.head_dim is None:
            found.append(replace(old, heads=heads, kv_heads=kv_heads, width=heads * old.head_dim))
            continue
        for eighths in range(_WIDTHS // 2, _WIDTHS + 1):
            width = old.width * eighths // _WIDTHS
            found.append(replace(old, heads=heads, kv_heads=kv_heads, width=width))
    return found


def _fitting(model: keras.Model, most: float) -> list[Shape]:
    """Returns shapes with at most so many weights, as many neurons as fit in each."""
    old = shape_of(model)
    period = period_of(model)
    step = max(1, old.feedforward // 32)
    found = []
    for shape in _smaller_heads(model):
        for depth in range(old.depth, max(old.depth // 3, 1) - 1, -period):
            shape = replace(shape, depth=depth)
            slope = count_parameters(model, replace(shape, feedforward=2)) - count_parameters(
                model, replace(shape, feedforward=1)
            )
            room = most - count_parameters(model, replace(shape, feedforward=0))
            neurons = int(min(room // slope, old.feedforward)) // step * step
            if neurons >= old.feedforward // 4:
                found.append(replace(shape, feedforward=neurons))
    large = [s for s in found if count_parameters(model, s) >= 0.9 * most]
    return large or found


def _kept(scores: np.ndarray, count: int) -> float:
    """Returns the share of importance that the best parts of each row have, mean over rows."""
    rows = np.sort(np.atleast_2d(scores), axis=-1)[:, ::-1]
    shares = rows[:, :count].sum(axis=-1) / np.maximum(rows.sum(axis=-1), 1e-30)
    return float(shares.mean())


def _promise(found: Importance, shape: Shape) -> float:
    """Returns how much importance a shape keeps, as a sum of logarithms."""
    shares = [
        _kept(np.maximum(found.depth, 0.0), shape.depth),
        _kept(found.feedforward, shape.feedforward),
        _kept(found.kv_heads, shape.kv_heads),
        _kept(found.width, shape.width),
    ]
    return sum(math.log(max(share, 1e-9)) for share in shares)


def _of_parameters(
    model: keras.Model, found: Importance, batches: list[Any], share: float, make: Make
) -> Any:
    """Returns the model with the lowest loss among those with so many weights."""
    most = share * count_parameters(model, shape_of(model))
    shapes = _fitting(model, most)
    if not shapes:
        old = shape_of(model)
        fewest = replace(_smaller_heads(model)[0], depth=max(old.depth // 3, 1))
        fewest = replace(fewest, feedforward=old.feedforward // 4)
        smallest = count_parameters(model, fewest)
        raise ValueError(
            f"No shape keeps {share:.0%} of the weights, {most:,.0f}: the smallest that is tried "
            f"has {smallest:,}. Give a larger share, shrink `vocabulary` first, or give numbers."
        )
    shapes = sorted(shapes, key=lambda shape: -_promise(found, shape))[:_COMPARED]
    models = [make(model, shape, found) for shape in track(shapes, "Making shapes that fit")]
    losses = [next_token_loss(small, batches) for small in track(models, "Comparing their losses")]
    return models[int(np.argmin(losses))]


def _relative_time(model: keras.Model, small: keras.Model, batches: list[Any]) -> float:
    """Returns the time per generated token of a file, over that of another, side by side."""
    from tfgptopt.evaluation.speed import compare_speed
    from tfgptopt.exporting import TFLite, export
    from tfgptopt.generation import TFLiteCausalLM

    prompt = [int(token) for token in np.asarray(batches[0]["token_ids"])[0, :8]]
    context = len(prompt) + _NEW_TOKENS
    limit = getattr(getattr(model, "backbone", model), "max_sequence_length", None)
    context = min(context, limit or context)
    with stage("Measuring the time per token"), tempfile.TemporaryDirectory() as folder:
        files = {
            name: export(each, Path(folder) / f"{name}.tflite", TFLite(context), verbose=0)
            for name, each in {"large": model, "small": small}.items()
        }
        loaded: dict[str, Any] = {name: TFLiteCausalLM(path) for name, path in files.items()}
        speeds = compare_speed(loaded, prompt, context - len(prompt), runs=9)
    return speeds["large"].tokens_per_second / speeds["small"].tokens_per_second


def search(
    model: keras.Model, found: Importance, data: Data, budget: str, share: float, make: Make
) -> Any:
    """Returns a smaller model for a budget.

    Args:
        model: The model to shrink.
        found: The importance of its parts.
        data: Calibration data, to compare losses with.
        budget: `"parameters"` or `"latency"`.
        share: float in (0, 1). What to keep of it.
        make: Makes a model of a shape.

    Raises:
        ValueError: If no shape fits.
    """
    batches = read_data(model, data)
    if budget == "parameters":
        return _of_parameters(model, found, batches, share, make)
    low, high, best, fastest = 0.05, 1.0, None, math.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        try:
            small = _of_parameters(model, found, batches, middle, make)
        except ValueError:
            low = middle
            continue
        time = _relative_time(model, small, batches)
        fastest = min(fastest, time)
        if time <= share:
            best, low = small, middle
        else:
            high = middle
    if best is None:
        raise ValueError(
            f"No shape takes {share:.0%} of the time per token: the fastest that was measured "
            f"takes {fastest:.0%}. Give a larger share."
        )
    return best
