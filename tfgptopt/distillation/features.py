"""Losses between the insides of a teacher and a student, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import keras
import tensorflow as tf

from tfgptopt.distillation.losses import Weight, check_weight
from tfgptopt.distillation.views import Lesson, View, attention_inside
from tfgptopt.families import blocks_of
from tfgptopt.model.types import Data

Place = int | str
Pairs = list[tuple[keras.Layer, keras.Layer]]
_SMALLEST = 1e-12


def _layer_at(model: keras.Layer, place: Place, whose: str) -> keras.Layer:
    if isinstance(place, str):
        layers = list(model._flatten_layers(include_self=False))
        found = [layer for layer in layers if place in (layer.name, layer.path)]
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"The {whose} '{model.name}' has {len(found)} layers named {place!r}; one was "
            "expected. Give the path of a layer, or the index of a decoder layer."
        )
    blocks = blocks_of(model)
    if not isinstance(place, int) or not -len(blocks) <= place < len(blocks):
        raise ValueError(
            f"The {whose} '{model.name}' has {len(blocks)} decoder layers. Received the layer "
            f"{place!r} in `layers`."
        )
    return blocks[place]


def pair_layers(
    student: keras.Layer, teacher: keras.Layer, layers: Mapping[Place, Place] | None
) -> Pairs:
    """Returns which layer of the student learns from which of the teacher.

    Args:
        student, teacher: The models.
        layers: Indices of decoder layers, or names or paths of layers, of the student to those of
            the teacher; `None` spreads the student's decoder layers evenly over the teacher's, the
            last to the last.

    Raises:
        ValueError: If a layer is not there, or there are none to spread.
    """
    if layers is not None:
        return [
            (_layer_at(student, mine, "student"), _layer_at(teacher, yours, "teacher"))
            for mine, yours in layers.items()
        ]
    mine, yours = blocks_of(student), blocks_of(teacher)
    if not mine or not yours:
        raise ValueError(
            "Student and teacher must be models of KerasHub to pair their decoder layers by "
            "themselves. Give `layers={'name in the student': 'name in the teacher'}`."
        )
    last = len(yours) / len(mine)
    return [(layer, yours[max(round((i + 1) * last), 1) - 1]) for i, layer in enumerate(mine)]


def _check_layers(layers: Any) -> None:
    if layers is not None and (not isinstance(layers, Mapping) or not layers):
        raise ValueError(
            "`layers` must be a non-empty mapping from layers of the student to layers of the "
            f"teacher, or None. Received: {layers!r}"
        )


@dataclass(frozen=True)
class HiddenStates:
    """The outputs of the student's layers should be those of the teacher's.

    Where the widths differ, the student's states are projected by a matrix that is learned
    beside the student, and belongs to the `Distiller`.

    Args:
        layers: Mapping from layers of the student to layers of the teacher: indices of decoder
            layers, or names or paths. Defaults to `None`: the student's decoder layers, spread
            evenly over the teacher's.
        distance: `"mse"`, the mean over features of squared differences, or `"cosine"`, one minus
            the cosine. Defaults to `"mse"`.
        projection: bool. Whether a projection may be learned. Defaults to `True`.
        weight: float, or a schedule over the optimizer's steps. Defaults to `1.0`.

    Raises:
        ValueError: If a setting is out of range; in `Distiller`, if a layer is not there, or
            widths differ and `projection` is false.

    Reference: Jiao et al., 2020, "TinyBERT" (https://arxiv.org/abs/1909.10351).
    """

    layers: Mapping[Place, Place] | None = None
    distance: Literal["mse", "cosine"] = "mse"
    projection: bool = True
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_layers(self.layers)
        if self.distance not in ("mse", "cosine"):
            raise ValueError(f"`distance` must be 'mse' or 'cosine'. Received: {self.distance!r}")

    @property
    def name(self) -> str:
        """What the term is called in logs."""
        return "hidden_states"

    def pairs(self, student: keras.Layer, teacher: keras.Layer) -> Pairs:
        """Returns the pairs of layers whose outputs are compared."""
        return pair_layers(student, teacher, self.layers)

    def per_token(self, student: View, lesson: Lesson, labels: Data) -> tf.Tensor:
        """Returns the mean distance over the pairs of layers; see `Loss`."""
        terms = []
        for (mine, yours), projection in lesson.pairs[id(self)].items():
            states = tf.cast(student.hidden[mine], tf.float32)
            wanted = tf.cast(lesson.view.hidden[yours], tf.float32)
            if projection is not None:
                states = tf.matmul(states, tf.cast(projection.value, tf.float32))
            terms.append(self._distance(states, wanted))
        return tf.add_n(terms) / len(terms)

    def _distance(self, states: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
        if self.distance == "mse":
            return tf.reduce_mean(tf.math.squared_difference(states, wanted), axis=-1)
        states = tf.math.l2_normalize(states, axis=-1, epsilon=_SMALLEST)
        wanted = tf.math.l2_normalize(wanted, axis=-1, epsilon=_SMALLEST)
        return 1.0 - tf.reduce_sum(states * wanted, axis=-1)


@dataclass(frozen=True)
class AttentionMaps:
    """The student should look where the teacher looks: KL of the attention distributions.

    Means over heads and layers. Where the numbers of heads differ, each model's maps are averaged
    over its heads first.

    Args:
        layers: Mapping from decoder layers of the student to those of the teacher; see
            `HiddenStates`. Defaults to `None`: spread evenly.
        weight: float, or a schedule over the optimizer's steps. Defaults to `1.0`.

    Raises:
        ValueError: If a setting is out of range; in `Distiller`, if a layer is not there or
            computes no attention; in `fit`, if it shows no map.

    Reference: Wang et al., 2020, "MiniLM" (https://arxiv.org/abs/2002.10957).
    """

    layers: Mapping[Place, Place] | None = None
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        _check_layers(self.layers)

    @property
    def name(self) -> str:
        """What the term is called in logs."""
        return "attention_maps"

    def pairs(self, student: keras.Layer, teacher: keras.Layer) -> Pairs:
        """Returns the pairs of layers whose maps are compared."""
        pairs = pair_layers(student, teacher, self.layers)
        return [(attention_inside(mine), attention_inside(yours)) for mine, yours in pairs]

    def per_token(self, student: View, lesson: Lesson, labels: Data) -> tf.Tensor:
        """Returns the mean divergence of a token's attention; see `Loss`."""
        terms = []
        for mine, yours in lesson.pairs[id(self)]:
            q = tf.cast(student.attention[mine], tf.float32)
            p = tf.cast(lesson.view.attention[yours], tf.float32)
            if p.shape[1] is None or p.shape[1] != q.shape[1]:
                p, q = (tf.reduce_mean(x, axis=1, keepdims=True) for x in (p, q))
            # What is masked has probability 0 in both, and adds nothing.
            ratio = tf.math.log(tf.maximum(p, _SMALLEST)) - tf.math.log(tf.maximum(q, _SMALLEST))
            terms.append(tf.reduce_mean(tf.reduce_sum(p * ratio, axis=-1), axis=1))
        return tf.add_n(terms) / len(terms)
