"""Rotation: turns features by orthogonal matrices in the weights, so that none stands out.

A row of inputs has one scale. Where a few features are much larger than the rest, it is theirs, and
the rest loses its bits. Turned by an orthogonal matrix, features are mixtures of all, alike in
size. Products that write features give turned ones, products that read them turn them back, and in
floats the model computes what it computed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import keras
import numpy as np

from tfgptopt.model.changing import changing, snapshot
from tfgptopt.model.current import full_precision
from tfgptopt.model.history import history_of, record, rewrite
from tfgptopt.model.precision import is_half
from tfgptopt.model.targets import target_of
from tfgptopt.model.techniques import register_technique
from tfgptopt.model.turning import Exponents, Turn, Turns, factors_of, is_turned, turn, turn_no_more
from tfgptopt.model.types import Config
from tfgptopt.quantization.rotatable import (
    Rotatable,
    check_rotatable,
    rotatable,
)
from tfgptopt.quantization.smoothing import gain_of
from tfgptopt.quantization.turned_weights import (
    fold_into_head,
    fold_large,
    fold_norm,
    move_large,
    turn_head,
    turn_inputs,
    turn_stream,
    turn_table,
    turn_values,
)

# How far logits may move, in standard deviations, when only the roundings of floats change.
_TOLERANCE = 2e-3
_TOKENS = 16
# The least power of two that is taken out of a column.
_LARGE = 2
# Fewer neurons than that share little.
_FEWEST = 8


@register_technique
@dataclass(frozen=True)
class Rotate:
    """Rotation as settings, before pruning and rounding.

    What is turned: the residual stream, with the token table and all that reads and writes it;
    values and what reads them, within each head; and, where it is asked for, the inputs of `down`.
    The final norm of a model whose table is its head goes on computing in the features of the
    model, one product of `width x width` floats for each token. In families with norms behind
    their branches (Gemma 2 and later) the stream stays as it is: the table alone is turned, its
    large columns made smaller before, and what is looked up is turned back.

    Args:
        seed: int. Which random signs. Defaults to `0`.
        down: int. How many neurons, one after the other, are turned together in front of `down`
            while the model runs; where that does not divide them, the largest of its halves that
            does. Defaults to `64`. `None`: none are.

        large: Large columns of a table that is turned alone, each with the power of two that is
            taken out of it, such as `((5, 7),)`. Defaults to `None`: they are found, and what is
            recorded of a model has them.
        steps: int. How many steps to learn the matrix of the stream in, beginning with the random
            one; 100 or so. It takes the data and the spec of `tfgptopt.quantize`, a causal LM whose
            stream can be turned, and time for a training step each. The matrix is saved with the
            weights. Defaults to `0`: it stays random.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "rotate"
    order: ClassVar[int] = 0

    seed: int = 0
    down: int | None = 64
    large: Exponents | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"`seed` must be an int >= 0. Received: {self.seed!r}")
        size = self.down
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2):
            raise ValueError(f"`down` must be None or an int >= 2. Received: {size!r}")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"`steps` must be an int >= 0. Received: {self.steps!r}")
        if self.large is not None:
            object.__setattr__(self, "large", _checked(self.large))

    def to_config(self) -> Config:
        """Returns the technique as plain data."""
        large = None if self.large is None else [list(pair) for pair in self.large]
        return {"name": self.name, **asdict(self), "large": large}

    @classmethod
    def from_config(cls, config: Config) -> Rotate:
        """Returns the technique that `to_config` wrote, given without its name.

        Raises:
            TypeError: If a field is not known.
            ValueError: If a field is out of range.
        """
        return cls(**config)

    def replay(self, model: keras.Layer) -> None:
        """Lets the layers of a reloaded model, whose weights are turned, turn what they did.

        Raises:
            ValueError: If the matrix was learned, and did not come with the weights.
        """
        found = rotatable(model)
        wanted = _turning_layers(found, self)
        if self.steps:
            downs = {id(target.layer) for target in found.downs}
            lacking = [x for x, _ in wanted if not is_turned(x) and id(x) not in downs]
            if lacking:
                raise ValueError(
                    f"{self!r} was learned, and {lacking[0].path} does not have its matrix, which "
                    "lies beside the weights. Load them with `tfgptopt.data.load_preset`, or "
                    "`load_weights`, and replay the recipe then."
                )
            wanted = [(layer, turns) for layer, turns in wanted if not is_turned(layer)]
        with changing(model):
            for layer, turns in wanted:
                turn(layer, turns)
        record(model, self)

    @classmethod
    def found_on(cls, model: keras.Layer) -> list[Rotate]:
        """Returns how a model was rotated, as its history shows."""
        return [technique for technique in history_of(model) if isinstance(technique, cls)]


def _checked(large: Any) -> Exponents:
    """Returns pairs of a column and an exponent.

    Raises:
        ValueError: If they are something else.
    """
    try:
        pairs = tuple((column, exponent) for column, exponent in large)
        if all(isinstance(x, int) and 0 <= x < limit for pair in pairs
               for x, limit in zip(pair, (2**31, 64), strict=True)):  # fmt: skip
            return pairs
    except (TypeError, ValueError):
        pass
    raise ValueError(f"`large` must be None or pairs of ints, (column, power). Received: {large!r}")


def rotate(
    model: keras.Layer, technique: Rotate | None = None, learned: np.ndarray | None = None
) -> keras.Layer:
    """Turns the features of a decoder, in place. In floats it computes what it computed before.

    Args:
        model: A causal LM of KerasHub, plain, or its backbone.
        technique: What is turned. Defaults to `None`: `Rotate()`.
        learned: float array `(width, width)`, the orthogonal matrix of the stream that was learned
            for `Rotate(steps=...)`. Defaults to `None`: it is a random one.

    Returns:
        The same model. What its backbone alone gives is turned too.

    Raises:
        ValueError: If the family is not known or a mixture of experts, a layer is rounded, pruned,
            frozen, shared or has LoRA adapters, a matrix is to be learned, or the model would not
            compute the same. The model is as it was then.

    Reference: Ashkboos et al., 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
    (https://arxiv.org/abs/2404.00456); Liu et al., 2024, "SpinQuant: LLM quantization with learned
    rotations" (https://arxiv.org/abs/2405.16406).

    Example:

    ```python
    tfgptopt.quantize(gpt, Int8(), ("rotation", "gptq"), windows)
    ```
    """
    technique = technique or Rotate()
    if learned is None:
        check_not_learned(technique)
    found = rotatable(model)
    check_rotatable(found)
    restore = snapshot(model)
    with changing(model):
        try:
            turn_features(model, technique, learned)
        except BaseException:
            undo(model)
            restore()
            raise
    return model


def turn_features(model: keras.Layer, technique: Rotate, learned: np.ndarray | None = None) -> None:
    """Rotates as `rotate` does, for those who hold the weights themselves and put them back.

    Raises:
        ValueError: As `rotate`. The model may be turned half-way then.
    """
    found = rotatable(model)
    check_rotatable(found)
    technique = replace(technique, large=_large_columns(found, technique))
    probe = _Probe(model, found)
    with changing(model):
        _turn_weights(found, technique, learned)
        for layer, turns in _turning_layers(found, technique, learned):
            turn(layer, turns)
        probe.check()
    record(model, technique)


def check_not_learned(technique: Rotate) -> None:
    """Raises if a rotation has to be learned before.

    Raises:
        ValueError: If it has.
    """
    if technique.steps:
        raise ValueError(
            f"{technique!r} is learned on text, for a spec: use `tfgptopt.quantize(model, spec, "
            f"({technique!r}, ...), data)`, or `steps=0` here."
        )


def why_not_rotated(model: keras.Layer) -> str | None:
    """Returns why a model cannot be rotated, or `None` if it can."""
    try:
        check_rotatable(rotatable(model))
    except ValueError as error:
        return str(error)
    return None


def is_rotated(model: keras.Layer) -> bool:
    """Returns whether a layer of a model goes on turning features."""
    return any(is_turned(layer) for layer in model._flatten_layers())


def undo(model: keras.Layer) -> None:
    """Lets the layers of a model turn nothing, and forgets it. Weights stay as they are."""
    for layer in model._flatten_layers():
        if is_turned(layer):
            turn_no_more(layer)
    kept = tuple(one for one in history_of(model) if not isinstance(one, Rotate))
    rewrite(model, kept)


class _Probe:
    """Tells whether a model computes what it computed."""

    def __init__(self, model: keras.Layer, found: Rotatable) -> None:
        self._model, self._found = model, found
        rows = int(target_of(found.table).matrix_shape[1])
        tokens = np.random.default_rng(0).integers(0, rows, (1, _TOKENS), np.int32)
        self._inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
        half = ("float16", "bfloat16")
        computes = any(layer.compute_dtype in half for layer in model._flatten_layers())
        self._is_half = computes or any(is_half(v) for v in model.variables)
        self._expected = self._logits()

    def _logits(self) -> np.ndarray:
        model, backbone = self._model, getattr(self._model, "backbone", self._model)
        found = model(self._inputs, training=False)
        if model is backbone and hasattr(self._found.table, "reverse_embeddings"):
            found = self._found.table(found, reverse=True)
        return np.asarray(keras.ops.convert_to_numpy(found), np.float32)

    def check(self) -> None:
        """Raises if something else comes out.

        Raises:
            ValueError: If it does.
        """
        moved = np.abs(self._logits() - self._expected).max() / self._expected.std()
        # Weights or activations of 16 bits are rounded anew.
        if not moved <= (0.5 if self._is_half else _TOLERANCE):
            raise ValueError(
                f"Rotation would move the logits of '{self._model.name}' by {moved:.2g} standard "
                "deviations, so something of it reads or writes features that its family's layout "
                "does not tell of. Leave rotation out."
            )


def stream_turn(found: Rotatable, technique: Rotate, learned: np.ndarray | None = None) -> Turn:
    """Returns how the stream is turned: by a random matrix, or the one that was learned."""
    matrix = None if learned is None else np.ascontiguousarray(learned, "<f4").tobytes()
    return Turn(found.width, technique.seed, found.keeps_mean and found.is_free, learned=matrix)


def _turns(
    found: Rotatable, technique: Rotate, learned: np.ndarray | None
) -> tuple[Turn, Turn | None]:
    """Returns how the stream is turned, and how the inputs of `down`."""
    stream = stream_turn(found, technique, learned)
    size = technique.down or 1
    while any(target.matrix_shape[0] % size for target in found.downs):
        size //= 2
    return stream, None if size < _FEWEST else Turn(size, technique.seed + 2)


def _folds_final(found: Rotatable) -> bool:
    """Returns whether the factors of the final norm become those of a head of its own."""
    return not found.is_tied and getattr(found.final_norm, "beta", None) is None


def _turning_layers(
    found: Rotatable, technique: Rotate, learned: np.ndarray | None = None
) -> list[tuple[keras.Layer, Turns]]:
    """Returns the layers that go on turning, and what."""
    stream, down = _turns(found, technique, learned)
    around = Turns(stream.inverse if found.is_free else None, stream)
    layers: list[tuple[keras.Layer, Turns]] = []
    if not _folds_final(found) or not found.is_free:
        layers.append((found.final_norm, around))
    if found.is_free and found.embedding_norm is not None:
        layers.append((found.embedding_norm, around))
    if not found.is_free and found.is_tied:
        layers.append((found.table, Turns(None, stream.inverse, technique.large or ())))
    if down is not None:
        layers += [(target.layer, Turns(before=down)) for target in found.downs]
    return layers


def _turn_weights(found: Rotatable, technique: Rotate, learned: np.ndarray | None) -> None:
    stream, down = _turns(found, technique, learned)
    if found.is_free:
        for branch in found.branches:
            fold_norm(branch, found.norm_offset)
        if _folds_final(found):
            fold_into_head(found)
        turn_stream(found, stream)
    for branch in () if found.is_free or found.shares_norms else found.branches:
        fold_large(branch, found.norm_offset, _LARGE)
    if not found.is_free and found.is_tied:
        move_large(found, factors_of(technique.large or (), found.width))
        turn_table(found.table, stream)
    if not found.is_tied:
        turn_head(found.table, stream)
    for values in found.values:
        turn_values(values, Turn(values.head_dim, technique.seed + 1))
    for target in found.downs if down is not None else ():
        assert down is not None
        turn_inputs(target, down)


def _large_columns(found: Rotatable, technique: Rotate) -> Exponents:
    """Returns the columns of a table that is turned alone which are much larger than the rest."""
    if found.is_free or not found.is_tied or gain_of(found.final_norm) is None:
        return ()
    if technique.large is not None:
        return technique.large
    table = full_precision(target_of(found.table).variable).numpy()
    sizes = np.sqrt(np.square(table).mean(0))
    exponents = np.rint(np.log2(np.maximum(sizes, 1e-30) / max(np.median(sizes), 1e-30)))
    return tuple((int(i), int(exponents[i])) for i in np.flatnonzero(exponents >= _LARGE))
