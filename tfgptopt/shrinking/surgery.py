"""Builds a smaller model from the parts of a larger one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfgptopt.families import Layout, Part, blocks_of, follow
from tfgptopt.shrinking.families import family_of, period_of, positions_of
from tfgptopt.shrinking.importance import Importance
from tfgptopt.shrinking.shapes import Shape, config_with, shape_of

Indices = np.ndarray


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays: indices in ascending order.

    Attributes:
        layers: Of decoder layers.
        width: Of features of the stream, the same everywhere.
        heads, kv_heads, feedforward: For each old layer, its own.
        vocabulary: Of tokens.
    """

    layers: Indices
    width: Indices
    heads: list[Indices]
    kv_heads: list[Indices]
    feedforward: list[Indices]
    vocabulary: Indices


def _best(scores: np.ndarray, count: int) -> Indices:
    """Returns the indices of the highest scores; of equals, the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _best_layers(scores: np.ndarray, count: int, period: int) -> Indices:
    groups = scores.reshape(-1, period).sum(axis=1)
    kept = _best(groups, count // period)
    return (kept[:, None] * period + np.arange(period)).reshape(-1)


def _best_heads(scores: np.ndarray, groups: Indices, old: Shape, new: Shape) -> Indices:
    """Returns the best heads of each group that stays, equally many of each."""
    size, kept = old.heads // old.kv_heads, new.heads // new.kv_heads
    chosen = [_best(scores[g * size : (g + 1) * size], kept) + g * size for g in groups]
    return np.concatenate(chosen)


def choose(
    model: keras.Model, shape: Shape, found: Importance | None, vocabulary: Indices | None = None
) -> Cut:
    """Returns which parts of a model stay for a smaller shape.

    Args:
        model: The model.
        shape: The shape to come.
        found: The importance of its parts; `None` if nothing goes that depends on it.
        vocabulary: Tokens that stay. Defaults to `None`: the first ones.
    """
    old = shape_of(model)
    family = family_of(model)

    def best(name: str, scores: Any, wanted: int, there: int) -> Indices:
        return np.arange(there) if wanted == there else _best(getattr(found, name)[scores], wanted)

    layers = range(old.depth)
    groups = [best("kv_heads", i, shape.kv_heads, old.kv_heads) for i in layers]
    heads = [np.arange(old.heads) for _ in layers]
    if family.kv_heads is None:
        heads = groups
    elif shape.heads != old.heads:
        assert found is not None
        heads = [_best_heads(found.heads[i], groups[i], old, shape) for i in layers]
    kept = np.arange(old.depth)
    if shape.depth != old.depth:
        assert found is not None
        kept = _best_layers(found.depth, shape.depth, period_of(model))
    return Cut(
        layers=kept,
        width=best("width", slice(None), shape.width, old.width),
        heads=heads,
        kv_heads=groups,
        feedforward=[best("feedforward", i, shape.feedforward, old.feedforward) for i in layers],
        vocabulary=np.arange(shape.vocabulary) if vocabulary is None else vocabulary,
    )


def _values(variable: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float32)


class _Surgeon:
    """Copies weights, cut along their axes.

    With fewer features, the mean square over features changes that each norm divides by. All that
    is written to the stream is therefore scaled by `sqrt(width / old width)`, and what reads it
    scaled back: a model whose missing features were dead computes the same, epsilons included.
    """

    def __init__(self, old: Any, new: Any, cut: Cut, found: Importance | None) -> None:
        self.family: Layout = family_of(old)
        self.old, self.new = (getattr(model, "backbone", model) for model in (old, new))
        self.cut, self.found = cut, found
        self.before, self.after = shape_of(old), shape_of(new)
        self.scale = (self.after.width / self.before.width) ** 0.5

    def _indices(self, axis: str, layer: int) -> Indices | None:
        if axis in ("head_dim", "context"):
            return None
        found = getattr(self.cut, axis)
        return found[layer] if isinstance(found, list) else found

    def _take(self, variable: keras.Variable, axes: tuple[str, ...], layer: int = 0) -> np.ndarray:
        values = _values(variable)
        for i, axis in enumerate(axes):
            indices = self._indices(axis, layer)
            if indices is not None:
                values = values.take(indices, axis=i)
        return values

    def _left(self, norm: keras.Layer) -> float:
        """Returns the root of the share of energy in front of a norm that its features keep."""
        if self.found is None or self.after.width == self.before.width:
            return 1.0
        energy = self.found.energies[norm.path]
        return float(np.sqrt(energy[self.cut.width].sum() / max(energy.sum(), 1e-30)))

    def _norm(self, old: Any, new: Any, factor: float, bias_factor: float = 1.0) -> None:
        """Copies a norm over the stream."""
        for source, target in zip(old.weights, new.weights, strict=True):
            values = self._take(source, ("width",))
            if source is getattr(old, "beta", None):
                target.assign(values * bias_factor)
                continue
            offset = self.family.norm_offset
            target.assign((values + offset) * factor * self._left(old) - offset)

    def _part(self, part: Part, old: Any, new: Any, layer: int) -> None:
        if part.kind == "norm":
            self._norm(old, new, 1.0 / self.scale)
            return
        if part.kind == "post_norm":
            self._norm(old, new, 1.0)
            return
        factor = self.scale if part.kind == "writes" else 1.0
        if part.kind == "query":
            factor = self._query_scale(layer)
        new._kernel.assign(self._take(old._kernel, part.axes, layer) * factor)
        if getattr(old, "bias", None) is not None:
            new.bias.assign(self._take(old.bias, part.bias, layer) * factor)

    def _query_scale(self, layer: int) -> float:
        """Returns what keeps the products of queries and keys as large as they were."""
        attention = follow(blocks_of(self.old)[layer], self.family.attention)
        if getattr(attention, "query_head_dim_normalize", True):
            return 1.0
        sizes = [shape.width // shape.heads for shape in (self.after, self.before)]
        return float((sizes[0] / sizes[1]) ** 0.5)

    def operate(self) -> None:
        """Copies everything."""
        for layer, new in zip(self.cut.layers, blocks_of(self.new), strict=True):
            old = blocks_of(self.old)[layer]
            handled: set[int] = set()
            for part in self.family.parts:
                source = part.of(old)
                if source is not None:
                    self._part(part, source, part.of(new), int(layer))
                    handled.update(id(variable) for variable in source.variables)
            for source, target in zip(old.variables, new.variables, strict=True):
                if id(source) not in handled:
                    target.assign(source)  # Norms of heads, and frequencies.
        self._embeddings()

    def _embeddings(self) -> None:
        family = self.family
        old, new = (follow(x, family.token_embedding) for x in (self.old, self.new))
        # A table that is multiplied by sqrt(width) is scaled by that already.
        factor = 1.0 if self.family.scales_tokens else self.scale
        new.embeddings.assign(self._take(old.embeddings, ("vocabulary", "width")) * factor)
        final = 1.0 / self.scale
        bias = 1.0
        if old.tie_weights:
            final, bias = final / factor, 1.0 / factor
        else:
            head = self._take(old.reverse_embeddings, ("width", "vocabulary"))
            new.reverse_embeddings.assign(head)
        source, target = (follow(x, family.final_norm) for x in (self.old, self.new))
        self._norm(source, target, final, bias)
        positions = positions_of(self.family, self.old)
        if positions is not None:
            table = self._take(positions.position_embeddings, ("context", "width"))
            target = positions_of(self.family, self.new)
            target.position_embeddings.assign(table[: self.after.context] * self.scale)


def build(model: keras.Model, shape: Shape) -> Any:
    """Returns a backbone of the class of a model's, of another shape, with random weights."""
    backbone = getattr(model, "backbone", model)
    return type(backbone).from_config(config_with(model, shape))


def operate(model: keras.Model, small: keras.Model, cut: Cut, found: Importance | None) -> None:
    """Copies what stays of a model into a smaller one.

    Args:
        model: The model to cut, which is left as it is.
        small: A model of the same family, of the shape of the cut.
        cut: What stays.
        found: Importance, for the energies that norms lose with features; `None` if none go.
    """
    _Surgeon(model, small, cut, found).operate()
