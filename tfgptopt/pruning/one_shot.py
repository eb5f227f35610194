"""Pruning at once, outside of `fit`."""

from __future__ import annotations

from numbers import Real
from typing import Any

import keras
import numpy as np

from tfgptopt.model import masks
from tfgptopt.model.changing import retrace, strategy_scope
from tfgptopt.model.targets import Selector, Target, select
from tfgptopt.pruning.checkpointing import mask_state
from tfgptopt.pruning.patterns import NM, Pattern, Unstructured
from tfgptopt.pruning.pruner import Pruner, check_settings
from tfgptopt.pruning.schedules import ConstantSparsity
from tfgptopt.pruning.scores import Magnitude, Movement, Score
from tfgptopt.pruning.sparsegpt import SparseGPT
from tfgptopt.pruning.sparsity_allocation import Allocation
from tfgptopt.pruning.technique import Settings


def prune(
    model: keras.Layer,
    sparsity: float | None = None,
    pattern: Pattern = Unstructured(),
    score: Score | SparseGPT = Magnitude(),
    targets: Selector | None = None,
    allocation: Allocation | None = None,
) -> keras.Layer:
    """Prunes a model at once, and holds the zeros in later training.

    Args:
        model: A built Keras 3 model. It is changed in place.
        sparsity: float in `[0, 1)`, the share of weights to drop. Defaults to `None`: that of an
            `NM` pattern; other patterns need a number.
        pattern: Which weights go together. Defaults to `Unstructured()`.
        score: How important a weight is: `Magnitude()`, `Wanda(data)` or `SparseGPT(data)`.
            Defaults to `Magnitude()`.
        targets: Selector of the weights. Defaults to `None`: all kernels but the head.
        allocation: How the sparsity is spread over weights, such as `owl(...)`. Defaults to
            `None`: evenly.

    Returns:
        The same model.

    Raises:
        ValueError: If a setting is out of range, two do not go together, the model is not built or
            pruned already, the calibration data is empty or does not fit, or nothing matches. The
            model is as it was then.

    Example:

    ```python
    tfgptopt.prune(model, 0.5)
    model.fit(data)             # recovers quality; pruned weights stay zero
    tfgptopt.finalize(model)
    ```
    """
    if sparsity is None and isinstance(pattern, NM):
        sparsity = pattern.sparsity
    if not isinstance(sparsity, Real) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"`sparsity` must be a number in [0, 1). Received: {sparsity!r}")
    if isinstance(score, Movement):
        raise ValueError("Movement gathers in training: give it to the callback `Pruning`.")
    for target in select(model, targets):
        if masks.masked(target.variable):
            raise ValueError(
                f"{target.path} is pruned already. Call `tfgptopt.finalize(model)` first to prune "
                "it again."
            )
    schedule = ConstantSparsity(float(sparsity), 0, frequency=1)
    if isinstance(score, SparseGPT):
        _prune_by_sparsegpt(model, schedule, pattern, score, targets, allocation)
        return model
    pruner = Pruner(model, schedule, pattern, score, targets, allocation)
    try:
        pruner.advance(0)
    except BaseException:
        masks.remove(pruner.targets)
        retrace(model)
        raise
    return model


def _prune_by_sparsegpt(
    model: keras.Layer,
    schedule: Any,
    pattern: Pattern,
    score: SparseGPT,
    selector: Selector | None,
    allocation: Allocation | None,
) -> None:
    if not isinstance(pattern, NM) and pattern != Unstructured():
        raise ValueError(f"SparseGPT prunes with Unstructured() or NM. Received: {pattern}")
    targets = check_settings(model, schedule, pattern, Magnitude(), selector, allocation)
    sparsity = schedule.target_sparsity
    shares = [sparsity] * len(targets)
    if allocation is not None:
        shares = allocation.at(sparsity, targets)
    of_variable = {id(t.variable): share for t, share in zip(targets, shares, strict=True)}
    before = {id(t.variable): keras.ops.convert_to_numpy(t.variable.value) for t in targets}
    found: list[tuple[Target, np.ndarray]] = []
    with strategy_scope(model):
        try:
            found.extend(score.prune(model, targets, of_variable, pattern))
        except BaseException:
            for target in targets:
                target.variable.assign(before[id(target.variable)])
            raise
        masks.attach(model, targets, Settings(schedule, pattern, score, allocation))
        for target, kept in found:
            target.variable.constraint.mask.assign(kept)
        masks.apply(targets)
        mask_state(model)
    retrace(model)
