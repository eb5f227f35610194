"""AWQ and SmoothQuant: chooses the factors by which features are moved into weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import batches_of, rows_of
from tfgptopt.calibration.journal import Arrays, Journal
from tfgptopt.calibration.routing import warn_of_unread
from tfgptopt.calibration.watching import advancing, observe_all
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Config, Data
from tfgptopt.quantization import rounding
from tfgptopt.quantization.quantizers import grids_of, row_blocks_of
from tfgptopt.quantization.rounding import Grid
from tfgptopt.quantization.row_rounding import fake_quantize_rows
from tfgptopt.quantization.smoothing import Pair
from tfgptopt.quantization.specs import Spec
from tfgptopt.terminal.progress import stage

Balance = Literal["awq", "smoothquant"]

_ROWS = 512
_EXPONENTS = tuple(i / 12 for i in range(13))
_NAMES = {"awq": "AWQ", "smoothquant": "SmoothQuant"}
# What trying all exponents costs about, in products of a row with the weights that a pair scales.
_TRIES = len(_EXPONENTS) * _ROWS


class _Inputs:
    """Gathers the mean and the largest magnitude of each input, and some rows. An observer.

    Magnitudes are shares of the largest in their row: each row has a scale of its own, so only
    differences within a row cost precision, and a few rows that are large as a whole do not decide.
    """

    def __init__(self, rows_per_call: int) -> None:
        self._rows_per_call = rows_per_call
        self._shared: dict[int, dict[str, Any]] = {}
        self._keys: dict[Any, int] = {}
        self._last: dict[int | None, tuple[tf.Tensor, int]] = {}

    def __call__(self, target: Target, rows: tf.Tensor) -> None:
        last, number = self._last.get(target.expert, (None, -1))
        shared = rows is last
        key = self._keys.setdefault(target.key, number if shared else len(self._keys))
        if not (shared and key == number):
            self._gather(key, rows)
        self._last[target.expert] = rows, key

    def _gather(self, key: int, rows: tf.Tensor) -> None:
        sizes = tf.abs(rows)
        sizes = tf.math.divide_no_nan(sizes, tf.reduce_max(sizes, 1, keepdims=True))
        picked = np.linspace(0, len(rows) - 1, min(self._rows_per_call, len(rows))).astype(int)
        new = {
            "sum": tf.reduce_sum(sizes, 0).numpy(),
            "largest": tf.reduce_max(sizes, 0).numpy(),
            "rows": [tf.gather(rows, picked)],
        }
        old = self._shared.get(key)
        if old is None:
            self._shared[key] = new
            return
        old["sum"] += new["sum"]
        old["largest"] = np.maximum(old["largest"], new["largest"])
        old["rows"] += new["rows"]

    def of(self, target: Target) -> Config | None:
        """Returns what was gathered for a target, or `None` for an expert that read nothing."""
        key = self._keys.get(target.key)
        return None if key is None else self._shared[key]


def balance(
    model: keras.Layer,
    chosen: list[tuple[Target, Spec]],
    pairs: list[Pair],
    data: Data,
    kind: Balance,
    journal: Journal | None = None,
) -> list[Pair]:
    """Moves the scale of features between inputs and weights, so that rounding costs least.

    For each place, factors of several strengths are tried on a sample of the inputs, with the very
    arithmetic that ships; not to move anything is one of them. In floats, the model computes what
    it computed before.

    Args:
        model: A built Keras 3 model, which is changed.
        chosen: Kernels and how they will be rounded.
        pairs: Where the scale can be moved, see `find_pairs`.
        data: Calibration data.
        kind: `"awq"`: a factor grows with the mean magnitude of its feature. `"smoothquant"`: it
            also shrinks with the largest weight that reads the feature.
        journal: Has what was found for the first pairs before, and is given the rest. Defaults to
            `None`: nothing is known or kept.

    Returns:
        The pairs whose factors were moved.

    Raises:
        ValueError: If there is no data, or the model cannot read it.

    Reference: Lin et al., 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration" (https://arxiv.org/abs/2306.00978); Xiao et al., 2023, "SmoothQuant: Accurate and
    Efficient Post-Training Quantization for Large Language Models"
    (https://arxiv.org/abs/2211.10438).
    """
    kernels = [target for target, _ in chosen if target.role != "embedding"]
    specs = {id(target.variable): spec for target, spec in chosen}
    batches = batches_of(data)
    inputs = _Inputs(max(1, _ROWS // len(batches)))
    rows = sum(rows_of(batch) for batch in batches)
    tries = {id(pair): _TRIES * sum(t.size for t in pair.consumers) for pair in pairs}
    journal = journal or Journal()
    known = journal.known(kind)
    reading = rows * sum(target.size for target in kernels) if known < len(pairs) else 0
    moved, unread = [], []
    with stage(
        f"{_NAMES[kind]}, reading", reading + sum(tries[id(pair)] for pair in pairs[known:])
    ) as shown:
        if reading:
            observe_all(model, kernels, batches, advancing(inputs, shown, lambda t: t.size))
        for i, pair in enumerate(pairs, 1):
            shown.say(f"{_NAMES[kind]}, place {i} of {len(pairs)}")
            if i <= known:
                found = journal.read(kind, i)
            else:
                found = _found(pair, inputs, specs, kind)
                journal.write(kind, i, found)
                shown.advance(tries[id(pair)])
            if "unread" in found:
                unread.append(pair.consumers[0])
            if "factors" in found:
                pair.fold(found["factors"])
                moved.append(pair)
    warn_of_unread(unread, f"{_NAMES[kind]} leaves its scales", stacklevel=4)
    return moved


def _found(pair: Pair, inputs: _Inputs, specs: dict[int, Spec], kind: Balance) -> Arrays:
    """Returns the factors of a pair, if some are better than none, or that it read nothing."""
    gathered = inputs.of(pair.consumers[0])
    if gathered is None:
        return {"unread": np.ones(1, np.int8)}
    factors = _best_factors(pair, gathered, specs, kind)
    return {} if factors is None else {"factors": factors}


def _by_feature(pair: Pair, values: np.ndarray) -> np.ndarray:
    """Returns the mean over the inputs of each feature."""
    counts = np.bincount(pair.channels, minlength=pair.features)
    return np.bincount(pair.channels, values, pair.features) / counts


def _best_factors(
    pair: Pair, gathered: dict[str, Any], specs: dict[int, Spec], kind: Balance
) -> np.ndarray | None:
    """Returns the factors with the smallest error, or `None` if none is better than no factors."""
    rows = tf.concat(gathered["rows"], 0)
    matrices = [target.to_matrix(target.variable.value) for target in pair.consumers]
    wanted = [rows @ matrix for matrix in matrices]
    # Every row counts alike.
    norms = [tf.reduce_sum(tf.square(exact), 1) + 1e-20 for exact in wanted]
    weights = np.max([np.abs(matrix).max(1) for matrix in matrices], 0)
    sizes = _by_feature(pair, gathered["sum" if kind == "awq" else "largest"])
    heights = _by_feature(pair, weights)
    sizes, heights = np.maximum(sizes, 1e-8 * sizes.max()), np.maximum(heights, 1e-8)
    best, least = None, np.inf
    for exponent in _EXPONENTS:
        raw = sizes**exponent
        if kind == "smoothquant" and exponent:
            raw = raw / heights ** (1.0 - exponent)
        factors = np.clip(raw / np.sqrt(raw.max() * raw.min()), 1e-3, 1e3).astype(np.float32)
        by_input = tf.constant(factors[pair.channels])
        error = 0.0
        for target, matrix, exact, norm in zip(
            pair.consumers, matrices, wanted, norms, strict=True
        ):
            spec = specs[id(target.variable)]
            grid = replace(grids_of(target, spec)[0][1], axes=(0,))
            scaled = matrix * by_input[:, tf.newaxis]
            parts = row_blocks_of(target, spec)
            got = _product(rows / by_input, scaled, spec, grid, parts)
            error += float(tf.reduce_sum(tf.reduce_sum(tf.square(got - exact), 1) / norm))
        if error < least:
            best, least = (factors if exponent else None), error
    return best


def _product(rows: tf.Tensor, matrix: tf.Tensor, spec: Spec, grid: Grid, parts: int) -> tf.Tensor:
    """Returns what a product of rows with a matrix gives once it is rounded."""
    integers, scale = rounding.quantize(matrix, grid)
    if spec.activations is not None:
        rows = fake_quantize_rows(rows, (-1,), parts)
    return rows @ rounding.dequantize(integers, scale, grid)
