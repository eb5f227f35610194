"""The shape of a model, and which smaller shapes it can take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import keras

from tfgptopt.families import Layout, blocks_of, follow
from tfgptopt.model.cloning import backbone_config
from tfgptopt.model.types import Config
from tfgptopt.shrinking.families import family_of, period_of, positions_of


@dataclass(frozen=True)
class Shape:
    """What can be cut of a model.

    Attributes:
        depth: Decoder layers.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_dim: Features of a head; it is never cut.
        feedforward: Neurons of the feed-forward network of a layer; Gemma's `intermediate_dim` is
            twice that.
        width: Features of the residual stream.
        vocabulary: Tokens.
        context: Positions, or `None` for models without a table of them.
    """

    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    feedforward: int
    width: int
    vocabulary: int
    context: int | None

    def __str__(self) -> str:
        heads = f"{self.heads} heads"
        if self.kv_heads != self.heads:
            heads += f" over {self.kv_heads} of keys and values"
        context = f", {self.context} positions" if self.context else ""
        return (
            f"{self.depth} layers, width {self.width}, {heads} of {self.head_dim}, "
            f"{self.feedforward} neurons, {self.vocabulary} tokens{context}"
        )


def shape_of(model: keras.Model) -> Shape:
    """Returns the shape of a model of KerasHub.

    Raises:
        ValueError: If its family cannot be shrunk.
    """
    family, backbone = family_of(model), getattr(model, "backbone", model)
    heads = getattr(backbone, family.heads)
    query = family.of_kind("query")[0]
    kernel = query.of(blocks_of(backbone)[0])._kernel
    positions = positions_of(family, backbone)
    return Shape(
        depth=backbone.num_layers,
        heads=heads,
        kv_heads=getattr(backbone, family.kv_heads) if family.kv_heads else heads,
        head_dim=int(kernel.shape[query.axes.index("head_dim")]),
        feedforward=backbone.intermediate_dim // (1 + family.gates_in_intermediate),
        width=backbone.hidden_dim,
        vocabulary=backbone.vocabulary_size,
        context=None if positions is None else backbone.max_sequence_length,
    )


def config_with(model: keras.Model, shape: Shape) -> Config:
    """Returns the configuration of a model's backbone with another shape."""
    family, backbone = family_of(model), getattr(model, "backbone", model)
    config = backbone_config(backbone)
    config |= {
        "num_layers": shape.depth,
        family.heads: shape.heads,
        "intermediate_dim": shape.feedforward * (1 + family.gates_in_intermediate),
        "hidden_dim": shape.width,
        "vocabulary_size": shape.vocabulary,
    }
    if family.kv_heads:
        config[family.kv_heads] = shape.kv_heads
    if family.head_dim:
        config[family.head_dim] = shape.head_dim
    if shape.context is not None:
        config["max_sequence_length"] = shape.context
    return config


def check_request(**settings: Any) -> tuple[str, float] | None:
    """Returns the name and value of the budget, or `None` if numbers are given.

    Raises:
        ValueError: If both are given, or nothing, or a budget is out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    budgets = [name for name in ("parameters", "latency") if name in given]
    if len(given) != 1 if budgets else not given:
        raise ValueError(
            "Give what to shrink (such as `depth=0.5`), or one budget (`parameters=0.7` or "
            f"`latency=0.6`). Received: {', '.join(given) or 'nothing'}"
        )
    if not budgets:
        return None
    name = budgets[0]
    if not isinstance(given[name], float) or not 0.0 < given[name] < 1.0:
        raise ValueError(f"`{name}` must be a float in (0, 1). Received: {given[name]!r}")
    return name, given[name]


def check_depth_score(depth_score: Any) -> None:
    """Raises unless this is a way to score layers.

    Raises:
        ValueError: If it is none.
    """
    if depth_score not in ("influence", "loss"):
        raise ValueError(f"`depth_score` must be 'influence' or 'loss'. Received: {depth_score!r}")


def absolute(name: str, wanted: Any, there: int, multiple: int = 1) -> int:
    """Returns a number that was given as it is or as a share."""
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        raise ValueError(
            f"`{name}` must be a number, or a share in (0, 1] as a float. Received: {wanted!r}"
        )
    if isinstance(wanted, float):
        if not 0.0 < wanted <= 1.0:
            raise ValueError(
                f"`{name}` as a share must be in (0, 1]; as a number it must be an int. "
                f"Received: {wanted!r}"
            )
        found = max(round(wanted * there / multiple), 1) * multiple
    else:
        found = wanted
    if not 1 <= found <= there:
        raise ValueError(
            f"The model has {name}={there}; it can be shrunk to 1 up to that. Received: {wanted!r}"
        )
    return found


def resolve(model: keras.Model, **wanted: Any) -> Shape:
    """Returns the shape that was asked for, completed where a family leaves no choice.

    Args:
        model: A model of KerasHub.
        **wanted: `depth`, `heads`, `kv_heads`, `feedforward`, `width`, `vocabulary`, `context`:
            ints, shares as floats, or `None` for no change.

    Raises:
        ValueError: If a number is out of range, or the family cannot have the shape, with the
            reason.
    """
    family, old = family_of(model), shape_of(model)
    backbone = getattr(model, "backbone", model)
    if wanted.get("context") is not None and old.context is None:
        raise ValueError(
            f"{type(backbone).__name__} has no table of positions to cut: it reads any number. Set "
            "`model.preprocessor.sequence_length`, or give `context_length` to "
            "`tfgptopt.export`."
        )
    new = old
    for name in ("depth", "feedforward", "vocabulary", "context"):
        if wanted.get(name) is not None:
            multiple = period_of(model) if name == "depth" else 1
            found = absolute(name, wanted[name], getattr(old, name), multiple)
            new = replace(new, **{name: found})
    period = period_of(model)
    if (old.depth - new.depth) % period:
        raise ValueError(
            f"The layers of this {type(backbone).__name__} alternate between {period} kinds of "
            f"attention, so they go {period} at a time: `depth` can be {old.depth} minus a "
            f"multiple of {period}. Received: {wanted['depth']!r}"
        )
    return _with_heads(family, old, new, wanted, type(backbone).__name__)


def _with_heads(family: Layout, old: Shape, new: Shape, wanted: Any, name: str) -> Shape:
    """Returns a shape with width and heads, which depend on each other."""
    width, heads, kv_heads = (wanted.get(key) for key in ("width", "heads", "kv_heads"))
    if family.kv_heads is None and kv_heads is not None:
        raise ValueError(
            f"{name} has as many heads of keys and values as of queries: use `heads`. "
            f"Received: kv_heads={kv_heads!r}"
        )
    tied, group = family.head_dim is None, old.heads // old.kv_heads
    if width is not None:
        width = absolute("width", width, old.width, old.head_dim if tied else 1)
        if tied and heads is None:
            if width % old.head_dim:
                raise ValueError(
                    f"The head size of {name} is hidden_dim // {family.heads}, "
                    f"{old.head_dim} here, and must stay: `width` has to be a multiple of it. "
                    f"Received: {width}"
                )
            heads = width // old.head_dim
    if kv_heads is not None:
        kv_heads = absolute("kv_heads", kv_heads, old.kv_heads)
        heads = kv_heads * group if heads is None else heads
    if heads is not None:
        step = 1 if family.kv_heads is None else (kv_heads or 1)
        heads = absolute("heads", heads, old.heads, step)
        if family.kv_heads is None:
            kv_heads = heads
        elif kv_heads is None:
            # Equally many of each group go; whole groups, if that cannot be.
            fits = heads % old.kv_heads == 0
            kv_heads = old.kv_heads if fits or heads % group else heads // group
    width, heads = width or old.width, heads or old.heads
    kv_heads = kv_heads or old.kv_heads
    if heads % kv_heads:
        raise ValueError(
            f"`heads` must be divisible by `kv_heads`: each serves as many. Received: "
            f"{heads} heads over {kv_heads}."
        )
    if heads // kv_heads > group:
        raise ValueError(
            f"Each of the {old.kv_heads} heads of keys and values serves {group} heads; "
            f"{heads} over {kv_heads} would need {heads // kv_heads} for each."
        )
    if tied and width != heads * old.head_dim:
        names = ("width", "heads", "kv_heads")
        given = ", ".join(f"{k}={wanted[k]!r}" for k in names if wanted.get(k) is not None)
        raise ValueError(
            f"The head size of {name} is hidden_dim // {family.heads}, {old.head_dim} here, and "
            f"must stay: {heads} heads need width={heads * old.head_dim}, and it would be {width}. "
            f"Received: {given}. Give `width={heads * old.head_dim}` too, or `width` alone, and "
            "heads follow."
        )
    return replace(new, width=width, heads=heads, kv_heads=kv_heads)


def count_parameters(model: keras.Model, shape: Shape) -> int:
    """Returns how many weights a model would have with another shape."""
    family, backbone = family_of(model), getattr(model, "backbone", model)
    block = blocks_of(backbone)[0]

    def size(axes: Any) -> int:
        return math.prod(getattr(shape, axis) for axis in axes)

    listed, each = 0, 0
    for part in family.parts:
        layer = part.of(block)
        if layer is None:
            continue
        if "norm" in part.kind:
            listed += sum(int(math.prod(v.shape)) for v in layer.weights)
            each += size(part.axes) * len(layer.weights)
        else:
            listed += sum(int(math.prod(v.shape)) for v in layer.weights)
            each += size(part.axes) + (size(part.bias) if _bias(layer) is not None else 0)
    others = sum(int(math.prod(v.shape)) for v in block.trainable_weights) - listed
    table = (
        shape.vocabulary
        * shape.width
        * (1 if follow(backbone, family.token_embedding).tie_weights else 2)
    )
    positions = (shape.context or 0) * shape.width
    final = shape.width * len(follow(backbone, family.final_norm).weights)
    return shape.depth * (each + others) + table + positions + final


def _bias(layer: keras.Layer) -> Any:
    return getattr(layer, "bias", None)
