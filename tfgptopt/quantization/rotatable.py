"""Where the features of a decoder can be turned: what reads its stream, and what writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfgptopt.families import Layout, follow, known_families, layout_of
from tfgptopt.model import masks
from tfgptopt.model.current import has_adapters
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.turning import is_turned
from tfgptopt.quantization.layers import spec_of


@dataclass(frozen=True, eq=False)
class Branch:
    """A norm over the stream, and the products that read what it gives."""

    norm: keras.Layer
    readers: tuple[Target, ...]


@dataclass(frozen=True, eq=False)
class Values:
    """Where heads make values, and the product that reads what they found.

    Attributes:
        value: A projection to values, or one to queries, keys and values of each head; `None` if
            the heads attend to values of another block.
        output: The product behind.
        head_dim: Features of a head.
        parts: How many things `value` gives for each head; values are the last of them.
    """

    value: Target | None
    output: Target
    head_dim: int
    parts: int


@dataclass(frozen=True, eq=False)
class Rotatable:
    """A decoder by what its features go through.

    Attributes:
        table: The token table.
        final_norm: The norm before the head.
        embedding_norm: The norm of the embeddings, or `None`.
        positions: The position table, or `None`.
        branches: What reads the stream.
        writers: Products that write it.
        values: Values and what reads them; empty if values are keys too.
        downs: Products that read neurons.
        width: Features of the stream.
        is_free: Whether the stream may be turned: nothing but norms in front of products treats
            its features one by one.
        shares_norms: Whether something else reads the norms in front of products.
        keeps_mean: Whether a norm subtracts the mean.
        norm_offset: What a norm adds to its factors.
    """

    table: Any
    final_norm: keras.Layer
    embedding_norm: keras.Layer | None
    positions: Any
    branches: tuple[Branch, ...]
    writers: tuple[Target, ...]
    values: tuple[Values, ...]
    downs: tuple[Target, ...]
    width: int
    is_free: bool
    shares_norms: bool
    keeps_mean: bool
    norm_offset: float

    @property
    def norms(self) -> list[keras.Layer]:
        """Returns the norms over the stream before products."""
        found = [branch.norm for branch in self.branches] + [self.final_norm]
        return found if self.embedding_norm is None else [self.embedding_norm, *found]

    @property
    def is_tied(self) -> bool:
        """Whether the token table is the head too."""
        return bool(getattr(self.table, "tie_weights", True))

    @property
    def targets(self) -> list[Target]:
        """The products that are turned."""
        found = [target for branch in self.branches for target in branch.readers]
        return [*found, *self.writers]


def _parts_of(block: keras.Layer, layout: Layout) -> dict[str, Any]:
    projections = ("query", "key", "value", "query_key_value", "output", "gate", "up", "down")
    names = (*projections, "post_attention_norm", "post_feedforward_norm", "value_norm")
    parts = {name: getattr(layout, name) for name in names}
    return {name: part and part.of(block) for name, part in parts.items()}


def _values(parts: dict[str, Any], heads: int) -> Values | None:
    """Returns the values of a block, or `None` if its keys are its values."""
    if parts["value"] is None and parts["key"] is not None:
        return None
    if getattr(parts["value_norm"], "weights", None):
        return None  # It has a factor for each feature.
    joint = parts["query_key_value"]
    query = target_of(joint if joint is not None else parts["query"])
    count = 3 if joint is not None else 1
    value = parts["value"] if joint is None else joint
    return Values(
        value=None if value is None else target_of(value),
        output=target_of(parts["output"]),
        head_dim=query.matrix_shape[1] // (heads * count),
        parts=count,
    )


def rotatable(model: keras.Layer) -> Rotatable:
    """Returns where the features of a decoder can be turned.

    Args:
        model: A causal LM of KerasHub, or its backbone.

    Raises:
        ValueError: If its family is not known, or nothing of it can be turned.
    """
    backbone, layout = getattr(model, "backbone", model), layout_of(model)
    if layout is None:
        raise ValueError(
            f"There is no layout of {type(backbone).__name__}, so nobody knows what reads its "
            f"stream. Rotation knows {', '.join(known_families())}, and what "
            "`tfgptopt.families.register` was given. Leave rotation out."
        )
    blocks = list(follow(backbone, layout.blocks))
    parts = [_parts_of(block, layout) for block in blocks]
    if any(one["up"] is None or one["down"] is None for one in parts):
        raise ValueError(
            f"{type(backbone).__name__} is a mixture of experts, whose router and experts read "
            "the stream too: rotation does not know them. Leave rotation out."
        )
    tower = next((name for name in layout.towers if getattr(backbone, name, None)), None)
    if tower is not None:
        raise ValueError(
            f"{type(backbone).__name__} reads more than text, through its `{tower}`: rotation "
            "tries models on text alone. Leave rotation out."
        )
    heads = int(follow(backbone, layout.heads))
    values = [_values(one, heads) for one in parts]
    norms = [(layout.attention_norm.of(b), layout.feedforward_norm.of(b)) for b in blocks]
    table = follow(backbone, layout.token_embedding)
    reads = ("query", "key", "value", "query_key_value"), ("gate", "up")
    branches = [
        Branch(norm, tuple(target_of(one[name]) for name in names if one[name] is not None))
        for one, pair in zip(parts, norms, strict=True)
        for norm, names in zip(pair, reads, strict=True)
    ]
    posts = ("post_attention_norm", "post_feedforward_norm")
    final = follow(backbone, layout.final_norm)
    return Rotatable(
        table=table,
        final_norm=final,
        embedding_norm=follow(backbone, layout.embedding_norm) if layout.embedding_norm else None,
        positions=follow(backbone, layout.positions) if layout.positions else None,
        branches=tuple(branches),
        writers=tuple(target_of(one[name]) for one in parts for name in ("output", "down")),
        values=() if None in values else tuple(one for one in values if one is not None),
        downs=tuple(target_of(one["down"]) for one in parts),
        width=target_of(table).matrix_shape[0],
        is_free=not layout.shares_norms
        and not any(one[name] is not None for one in parts for name in posts),
        shares_norms=layout.shares_norms,
        keeps_mean=hasattr(final, "gamma"),
        norm_offset=0.0 if hasattr(final, "gamma") else layout.norm_offset,
    )


def _touched(found: Rotatable) -> Iterator[tuple[keras.Layer, keras.Variable]]:
    for target in found.targets:
        yield target.layer, target.variable
    yield found.table, target_of(found.table).variable
    if found.positions is not None:
        yield found.positions, found.positions.position_embeddings
    for norm in found.norms:
        for variable in norm.weights:
            yield norm, variable


def check_rotatable(found: Rotatable) -> None:
    """Raises unless all that would be turned is plain, and there once.

    Raises:
        ValueError: If a layer is rounded, pruned, frozen, adapted, turned or shared.
    """
    layers = [*(target.layer for target in found.targets), *found.norms, found.table]
    shared = [i for i, count in Counter(map(id, layers)).items() if count > 1]
    if shared:
        layer = next(layer for layer in layers if id(layer) in shared)
        raise ValueError(
            f"{layer.path} is used in several places, so its features cannot be turned for one of "
            "them. Leave rotation out."
        )
    for layer, variable in _touched(found):
        reasons = {
            "is rotated already": is_turned(layer),
            "is rounded already: rotate first": spec_of(layer) is not None,
            "is pruned, and turning would fill its zeros: prune after rotation": (
                masks.masked(variable) or (layer is not found.table and _mostly_zero(variable))
            ),
            "has LoRA adapters: merge them first": has_adapters(layer),
            "is frozen: unfreeze it first, rotation changes every weight": not (
                layer.trainable and variable.trainable
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"{variable.path} {reason}, or leave rotation out.")


def _mostly_zero(variable: keras.Variable) -> bool:
    """Returns whether a matrix looks as pruning leaves it."""
    if len(variable.shape) < 2:
        return False
    values = keras.ops.convert_to_numpy(variable.value)
    return bool(np.count_nonzero(values) < 0.9 * values.size)
