"""Layers that turn what they read, or what they give, by an orthogonal matrix.

Where a model's weights were turned and one of its layers cannot be, because it treats features one
by one, that layer computes with its features turned back: it is dressed, and keeps its variables,
name and path.

Turned weights mean nothing to a model that does not turn, and look like any others. So what a layer
turns is saved with its variables: a plain layer refuses such a checkpoint, as Keras has it, and
within `accepting_turns` it turns from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import keras
import numpy as np

from tfgptopt.model.dressing import put_on, register_mixin, take_off, worn_by
from tfgptopt.model.orthogonal import orthogonal
from tfgptopt.model.overriding import overriding

_ATTRIBUTE = "_tfgptopt_turns"
# Beside the variables of a layer that turns, in its part of a checkpoint.
STORED = "tfgptopt_turns"
# Features that are multiplied, each with the exponent of a power of two.
Exponents = tuple[tuple[int, int], ...]
# Behind the words of what a layer turns, which never have it.
_END = b"\0"


def factors_of(exponents: Exponents, size: int) -> np.ndarray:
    """Returns a factor for each of so many features, float32."""
    factors = np.ones(size, np.float32)
    for feature, exponent in exponents:
        factors[feature] = 2.0**exponent
    return factors


@dataclass(frozen=True)
class Turn:
    """By which matrix rows of features are turned.

    Attributes:
        size: How many features, one after the other, are turned together.
        seed: Which matrix: see `orthogonal`.
        keeps_mean: As there.
        back: Whether it is the inverse, which turns back.
        learned: The matrix itself, float32, where it is none of those. Defaults to `None`.
    """

    size: int
    seed: int
    keeps_mean: bool = False
    back: bool = False
    learned: bytes | None = field(default=None, repr=False)

    @property
    def inverse(self) -> Turn:
        """The turn that undoes it."""
        return replace(self, back=not self.back)

    @property
    def matrix(self) -> np.ndarray:
        """float32 array `(size, size)` that rows are multiplied with."""
        if self.learned is None:
            found = orthogonal(self.size, self.seed, self.keeps_mean)
        else:
            found = np.frombuffer(self.learned, "<f4").reshape(self.size, self.size)
        return found.T if self.back else found

    def rows(self, features: np.ndarray) -> np.ndarray:
        """Returns a float32 array whose last axis is turned, `size` features after another."""
        blocks = features.reshape(-1, self.size) @ self.matrix
        found: np.ndarray = blocks.reshape(features.shape)
        return found

    def of(self, features: Any) -> Any:
        """Returns a tensor whose last axis is turned, `size` features after another."""
        shape = tuple(features.shape)
        matrix = keras.ops.cast(keras.ops.convert_to_tensor(self.matrix), features.dtype)
        if shape[-1] == self.size:
            return keras.ops.matmul(features, matrix)
        sizes = [keras.ops.shape(features)[i] if n is None else n for i, n in enumerate(shape)]
        blocks = keras.ops.reshape(features, (*sizes[:-1], shape[-1] // self.size, self.size))
        return keras.ops.reshape(keras.ops.matmul(blocks, matrix), sizes)


@dataclass(frozen=True)
class Turns:
    """What a layer does to its features, and to what it gives: `None` for nothing.

    Attributes:
        before: How what it reads is turned.
        after: How what it gives is turned.
        exponents: What that is multiplied with, feature by feature. Powers of two are exact.
    """

    before: Turn | None = None
    after: Turn | None = None
    exponents: Exponents = ()

    def to_array(self) -> np.ndarray:
        """Returns them as bytes that a checkpoint can hold: words, and matrices behind them."""
        fields, matrices = asdict(self), []
        for turn in (fields["before"], fields["after"]):
            learned = turn.pop("learned") if turn else None
            if learned is not None:
                matrices += [] if learned in matrices else [learned]
                turn["learned"] = matrices.index(learned)
        parts = [json.dumps(fields).encode(), *([_END, *matrices] if matrices else [])]
        return np.frombuffer(b"".join(parts), np.uint8)

    @classmethod
    def from_array(cls, array: Any) -> Turns:
        """Returns what `to_array` wrote."""
        words, _, matrices = np.asarray(array, np.uint8).tobytes().partition(_END)
        fields = json.loads(words)

        def turn(its: dict[str, Any] | None) -> Turn | None:
            if its is None:
                return None
            if "learned" in its:
                length = 4 * its["size"] ** 2
                begin = its["learned"] * length
                its["learned"] = matrices[begin : begin + length]
            return Turn(**its)

        exponents = tuple((int(i), int(n)) for i, n in fields["exponents"])
        return cls(turn(fields["before"]), turn(fields["after"]), exponents)


class TurnedMixin:
    """Runs the layer's own `call` on turned features, or turns what it gives.

    Of a table, rows that are looked up are turned; what it multiplies with as a head is not.
    """

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        turns = turns_of(self)  # type: ignore[arg-type]
        is_table = isinstance(self, keras.layers.Embedding)
        if is_table and (args[0] if args else kwargs.get("reverse", False)):
            return super().call(inputs, *args, **kwargs)  # type: ignore[misc]
        given = inputs if turns.before is None else turns.before.of(inputs)
        result = super().call(given, *args, **kwargs)  # type: ignore[misc]
        if turns.after is None:
            return result
        turned, mask = turns.after.of(result), getattr(result, "_keras_mask", None)
        if turns.exponents:
            factors = factors_of(turns.exponents, int(turned.shape[-1]))
            turned = turned * keras.ops.cast(factors, turned.dtype)
        if mask is not None:
            turned._keras_mask = mask
        return turned

    def save_own_variables(self, store: Any) -> None:
        """Writes what the layer turns beside its variables."""
        super().save_own_variables(store)  # type: ignore[misc]
        store[STORED] = turns_of(self).to_array()  # type: ignore[arg-type]

    def load_own_variables(self, store: Any) -> None:
        """Reads the variables of a layer that turns the same.

        Raises:
            ValueError: If they are those of another one, whose weights mean something else.
        """
        found = _stored(store)
        if found != turns_of(self):  # type: ignore[arg-type]
            other = "of a model that was not rotated" if found is None else "rotated otherwise"
            raise ValueError(
                f"{self.path} turns its features, and the checkpoint is {other}: its weights "  # type: ignore[attr-defined]
                "would compute something else. Load it into the plain model, and rotate that."
            )
        super().load_own_variables(_without(store))  # type: ignore[misc]


def _stored(store: Any) -> Turns | None:
    names = tuple(store.keys())
    return Turns.from_array(store[STORED]) if STORED in names else None


def _without(store: Any) -> dict[str, Any]:
    names = tuple(store.keys())
    return {name: store[name] for name in names if name != STORED}


register_mixin(TurnedMixin, "Turned", 0)


def turns_of(layer: keras.Layer) -> Turns:
    """Returns what a layer turns: nothing, of a plain one."""
    found: Turns = getattr(layer, _ATTRIBUTE, Turns())
    return found


def is_turned(layer: keras.Layer) -> bool:
    """Returns whether a layer turns something."""
    return TurnedMixin in worn_by(layer)


def turn(layer: keras.Layer, turns: Turns) -> None:
    """Lets a layer turn what it reads and gives from now on."""
    object.__setattr__(layer, _ATTRIBUTE, turns)
    put_on(layer, TurnedMixin)


def turn_no_more(layer: keras.Layer) -> None:
    """Lets a layer compute as its own class does."""
    take_off(layer, TurnedMixin)
    if hasattr(layer, _ATTRIBUTE):
        object.__delattr__(layer, _ATTRIBUTE)


def copy_turns(model: keras.Layer, copy: keras.Layer) -> None:
    """Lets the layers of a copy turn what those of the model turn."""
    # Around its backbone a model may have more, such as what it was compiled with.
    inner, its_copy = (getattr(one, "backbone", one) for one in (model, copy))
    turned = {i: x for i, x in enumerate(inner._flatten_layers()) if is_turned(x)}
    layers = list(its_copy._flatten_layers()) if turned else []
    for i, layer in turned.items():
        turn(layers[i], turns_of(layer))


@contextmanager
def accepting_turns(model: keras.Layer) -> Iterator[None]:
    """Lets the layers of a plain model turn what those of a checkpoint do that is loaded inside."""

    def wrap(layer: keras.Layer) -> Any:
        load = layer.load_own_variables

        def accepting(store: Any) -> None:
            found = _stored(store)
            if found is None:
                load(store)
            else:
                load(_without(store))
                turn(layer, found)

        return accepting

    layers = [layer for layer in model._flatten_layers() if not is_turned(layer)]
    with overriding([(layer, "load_own_variables", wrap(layer)) for layer in layers]):
        yield
