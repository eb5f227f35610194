"""Turns weights, and moves what norms multiply and add into the products behind them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tfgptopt.model.current import full_precision
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.turning import Turn
from tfgptopt.quantization.rotatable import Branch, Rotatable, Values
from tfgptopt.quantization.smoothing import Pair, gain_of


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


def turn_inputs(target: Target, turn: Turn) -> None:
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


def fold_large(branch: Branch, offset: float, least: int) -> None:
    """Moves what is large of the factors of a norm into the products that read it.

    Args:
        branch: The norm and the products.
        offset: What the norm adds to its factors.
        least: The least power of two above the median that is moved.
    """
    gain = gain_of(branch.norm)
    if gain is None:
        return
    sizes = np.abs(full_precision(gain).numpy() + offset)
    exponents = np.rint(np.log2(np.maximum(sizes, 1e-30) / max(np.median(sizes), 1e-30)))
    factors = np.exp2(np.where(exponents >= least, exponents, 0.0)).astype(np.float32)
    if (factors != 1).any():
        Pair(branch.norm, branch.readers, np.arange(len(factors))).fold(factors)


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
    turn_table(found.table, stream)
    if found.positions is not None:
        table = found.positions.position_embeddings
        table.assign(stream.rows(full_precision(table).numpy()))
    for branch in found.branches:
        beta = getattr(branch.norm, "beta", None)
        if beta is not None:
            beta.assign(stream.rows(full_precision(beta).numpy()))
        for target in branch.readers:
            turn_inputs(target, stream)
    for target in found.writers:
        _turn_outputs(target, stream)


def turn_table(table: Any, stream: Turn) -> None:
    variable = target_of(table).variable
    variable.assign(stream.rows(full_precision(variable).numpy()))


def move_large(found: Rotatable, factors: np.ndarray) -> None:
    """Divides columns of the table, which the final norm multiplies as a head's inputs."""
    variable, gain = target_of(found.table).variable, gain_of(found.final_norm)
    if gain is None or (factors == 1).all():
        return
    variable.assign(full_precision(variable).numpy() / factors)
    offset, beta = found.norm_offset, getattr(found.final_norm, "beta", None)
    gain.assign((full_precision(gain).numpy() + offset) * factors - offset)
    if beta is not None:
        beta.assign(full_precision(beta).numpy() * factors)


def turn_head(table: Any, stream: Turn) -> None:
    head = table.reverse_embeddings
    turned = stream.rows(np.ascontiguousarray(full_precision(head).numpy().T))
    head.assign(turned.T)


def fold_into_head(found: Rotatable) -> None:
    gain, head = gain_of(found.final_norm), found.table.reverse_embeddings
    factors = full_precision(gain).numpy() + found.norm_offset
    head.assign(full_precision(head).numpy() * factors[:, np.newaxis])
    gain.assign(np.full_like(factors, 1.0 - found.norm_offset))


def turn_values(values: Values, turn: Turn) -> None:
    """Turns the values of each head, and the product that reads them."""
    if values.value is not None:
        _turn_last(values.value, turn, values.parts)
    turn_inputs(values.output, turn)


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
