"""Rotation: turns features by orthogonal matrices in the weights, so that none stands out.

A row of inputs has one scale. Where a few features are much larger than the rest, it is theirs, and
the rest loses its bits. Turned by an orthogonal matrix, features are mixtures of all, alike in
size. Products that write features give turned ones, products that read them turn them back, and in
floats the model computes what it computed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from tfgptopt.model.changing import changing
from tfgptopt.model.current import full_precision
from tfgptopt.model.history import history_of, record, rewrite
from tfgptopt.model.precision import is_half
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.techniques import register_technique
from tfgptopt.model.turning import Turn, Turns, is_turned, turn, turn_no_more
from tfgptopt.model.types import Config
from tfgptopt.quantization.rotatable import (
    Branch,
    Rotatable,
    Values,
    check_rotatable,
    rotatable,
)
from tfgptopt.quantization.smoothing import gain_of

# How far logits may move, in standard deviations, when only the roundings of floats change.
_TOLERANCE = 2e-3
_TOKENS = 16
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
    their branches (Gemma 2 and later) the stream stays as it is: the table alone is turned, and
    what is looked up is turned back.

    Args:
        seed: int. Which random signs. Defaults to `0`.
        down: int. How many neurons, one after the other, are turned together in front of `down`
            while the model runs; where that does not divide them, the largest of its halves that
            does. Defaults to `64`. `None`: none are.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "rotate"
    order: ClassVar[int] = 0

    seed: int = 0
    down: int | None = 64

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"`seed` must be an int >= 0. Received: {self.seed!r}")
        size = self.down
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2):
            raise ValueError(f"`down` must be None or an int >= 2. Received: {size!r}")

    def to_config(self) -> Config:
        """Returns the technique as plain data."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_config(cls, config: Config) -> Rotate:
        """Returns the technique that `to_config` wrote, given without its name.

        Raises:
            TypeError: If a field is not known.
            ValueError: If a field is out of range.
        """
        return cls(**config)

    def replay(self, model: keras.Layer) -> None:
        """Lets the layers of a reloaded model, whose weights are turned, turn what they did."""
        found = rotatable(model)
        with changing(model):
            for layer, turns in _turning_layers(found, self):
                turn(layer, turns)
        record(model, self)

    @classmethod
    def found_on(cls, model: keras.Layer) -> list[Rotate]:
        """Returns how a model was rotated, as its history shows."""
        return [technique for technique in history_of(model) if isinstance(technique, cls)]


def rotate(model: keras.Layer, technique: Rotate | None = None) -> keras.Layer:
    """Turns the features of a decoder, in place. In floats it computes what it computed before.

    Args:
        model: A causal LM of KerasHub, plain, or its backbone.
        technique: What is turned. Defaults to `None`: `Rotate()`.

    Returns:
        The same model. What its backbone alone gives is turned too.

    Raises:
        ValueError: If the family is not known or a mixture of experts, a layer is rounded, pruned,
            frozen, shared or has LoRA adapters, or the model would not compute the same. The model
            is as it was then.

    Reference: Ashkboos et al., 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
    (https://arxiv.org/abs/2404.00456); Liu et al., 2024, "SpinQuant: LLM quantization with learned
    rotations" (https://arxiv.org/abs/2405.16406).

    Example:

    ```python
    tfgptopt.quantize(gpt, Int8(), ("rotation", "gptq"), windows)
    ```
    """
    technique = technique or Rotate()
    found = rotatable(model)
    check_rotatable(found)
    probe = _Probe(model, found)
    before = [(v, keras.ops.convert_to_numpy(v.value)) for v in model.variables]
    with changing(model):
        try:
            _turn_weights(found, technique)
            for layer, turns in _turning_layers(found, technique):
                turn(layer, turns)
            probe.check()
        except BaseException:
            undo(model)
            for variable, value in before:
                variable.assign(value)
            raise
    record(model, technique)
    return model


def why_not_rotated(model: keras.Layer) -> str | None:
    """Returns why a model cannot be rotated, or `None` if it can."""
    try:
        check_rotatable(rotatable(model))
    except ValueError as error:
        return str(error)
    return None


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
        self._is_half = any(is_half(v) for v in model.variables)
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
        # Weights of 16 bits are rounded anew.
        if not moved <= (0.5 if self._is_half else _TOLERANCE):
            raise ValueError(
                f"Rotation would move the logits of '{self._model.name}' by {moved:.2g} standard "
                "deviations, so something of it reads or writes features that its family's layout "
                "does not tell of. Leave rotation out."
            )


def _turns(found: Rotatable, technique: Rotate) -> tuple[Turn, Turn | None]:
    """Returns how the stream is turned, and how the inputs of `down`."""
    stream = Turn(found.width, technique.seed, found.keeps_mean and found.is_free)
    size = technique.down or 1
    while any(target.matrix_shape[0] % size for target in found.downs):
        size //= 2
    return stream, None if size < _FEWEST else Turn(size, technique.seed + 2)


def _folds_final(found: Rotatable) -> bool:
    """Returns whether the factors of the final norm become those of a head of its own."""
    return not found.is_tied and getattr(found.final_norm, "beta", None) is None


def _turning_layers(found: Rotatable, technique: Rotate) -> list[tuple[keras.Layer, Turns]]:
    """Returns the layers that go on turning, and what."""
    stream, down = _turns(found, technique)
    around = Turns(stream.inverse if found.is_free else None, stream)
    layers: list[tuple[keras.Layer, Turns]] = []
    if not _folds_final(found) or not found.is_free:
        layers.append((found.final_norm, around))
    if found.is_free and found.embedding_norm is not None:
        layers.append((found.embedding_norm, around))
    if not found.is_free and found.is_tied:
        layers.append((found.table, Turns(after=stream.inverse)))
    if down is not None:
        layers += [(target.layer, Turns(before=down)) for target in found.downs]
    return layers


def _turn_weights(found: Rotatable, technique: Rotate) -> None:
    stream, down = _turns(found, technique)
    if found.is_free:
        for branch in found.branches:
            fold_norm(branch, found.norm_offset)
        if _folds_final(found):
            _fold_into_head(found)
        turn_stream(found, stream)
    elif found.is_tied:
        _turn_table(found.table, stream)
    if not found.is_tied:
        _turn_head(found.table, stream)
    for values in found.values:
        turn_values(values, Turn(values.head_dim, technique.seed + 1))
    for target in found.downs if down is not None else ():
        assert down is not None
        _turn_inputs(target, down)


def _matrix(target: Target) -> np.ndarray:
    found: np.ndarray = target.to_matrix(full_precision(target.variable)).numpy()
    return found


def _assign(target: Target, matrix: np.ndarray) -> None:
    target.variable.assign(target.from_matrix(matrix.astype(np.float32)))


def _bias(target: Target) -> np.ndarray | None:
    bias = getattr(target.layer, "bias", None)
    return None if bias is None else full_precision(bias).numpy().reshape(-1)


def _assign_bias(target: Target, values: np.ndarray) -> None:
    target.layer.bias.assign(values.reshape(target.layer.bias.shape))


def _turn_inputs(target: Target, turn: Turn) -> None:
    _assign(target, turn.rows(np.ascontiguousarray(_matrix(target).T)).T)


def _turn_outputs(target: Target, turn: Turn) -> None:
    _assign(target, turn.rows(_matrix(target)))
    bias = _bias(target)
    if bias is not None:
        _assign_bias(target, turn.rows(bias))


def fold_norm(branch: Branch, offset: float) -> None:
    """Moves factors and summands of a norm into the products that read it.

    Args:
        branch: The norm and the products.
        offset: What the norm adds to its factors.

    Raises:
        ValueError: If summands can go nowhere.
    """
    gain = gain_of(branch.norm)
    if gain is None:
        return
    factors = full_precision(gain).numpy() + offset
    beta = getattr(branch.norm, "beta", None)
    if beta is not None:
        _fold_beta(branch, beta, factors)
    for target in branch.readers:
        _assign(target, _matrix(target) * factors[:, np.newaxis])
    gain.assign(np.full_like(factors, 1.0 - offset))


def _fold_beta(branch: Branch, beta: keras.Variable, factors: np.ndarray) -> None:
    summands = full_precision(beta).numpy()
    if all(_bias(target) is not None for target in branch.readers):
        for target in branch.readers:
            _assign_bias(target, _bias(target) + summands @ _matrix(target))
        beta.assign(np.zeros_like(summands))
        return
    if (np.abs(factors) < 1e-3 * np.abs(factors).max()).any() and summands.any():
        raise ValueError(
            f"{branch.norm.path} adds a summand that the products behind it, which have no bias, "
            "cannot take, and some of its factors are next to zero. Leave rotation out."
        )
    beta.assign(np.divide(summands, factors, where=factors != 0, out=np.zeros_like(summands)))


def turn_stream(found: Rotatable, stream: Turn) -> None:
    """Turns all that reads or writes the stream. Norms before products are folded already."""
    _turn_table(found.table, stream)
    if found.positions is not None:
        table = found.positions.position_embeddings
        table.assign(stream.rows(full_precision(table).numpy()))
    for branch in found.branches:
        beta = getattr(branch.norm, "beta", None)
        if beta is not None:
            beta.assign(stream.rows(full_precision(beta).numpy()))
        for target in branch.readers:
            _turn_inputs(target, stream)
    for target in found.writers:
        _turn_outputs(target, stream)


def _turn_table(table: Any, stream: Turn) -> None:
    variable = target_of(table).variable
    variable.assign(stream.rows(full_precision(variable).numpy()))


def _turn_head(table: Any, stream: Turn) -> None:
    head = table.reverse_embeddings
    turned = stream.rows(np.ascontiguousarray(full_precision(head).numpy().T))
    head.assign(turned.T)


def _fold_into_head(found: Rotatable) -> None:
    gain, head = gain_of(found.final_norm), found.table.reverse_embeddings
    factors = full_precision(gain).numpy() + found.norm_offset
    head.assign(full_precision(head).numpy() * factors[:, np.newaxis])
    gain.assign(np.full_like(factors, 1.0 - found.norm_offset))


def turn_values(values: Values, turn: Turn) -> None:
    """Turns the values of each head, and the product that reads them."""
    if values.value is not None:
        _turn_last(values.value, turn, values.parts)
    _turn_inputs(values.output, turn)


def _turn_last(target: Target, turn: Turn, parts: int) -> None:
    """Turns the last of the parts that a projection gives for each head."""

    def turned(rows: np.ndarray) -> np.ndarray:
        by_part = rows.reshape(*rows.shape[:-1], -1, parts, turn.size).copy()
        by_part[..., -1, :] = turn.rows(np.ascontiguousarray(by_part[..., -1, :]))
        return by_part.reshape(rows.shape)

    _assign(target, turned(_matrix(target)))
    bias = _bias(target)
    if bias is not None:
        _assign_bias(target, turned(bias))
