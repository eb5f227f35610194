"""Pruning at once, outside of `fit`."""

from __future__ import annotations

from numbers import Real

import keras
import numpy as np

from tfgptopt.model import masks
from tfgptopt.model.changing import changing
from tfgptopt.model.targets import Selector, Target
from tfgptopt.pruning.checkpointing import mask_state
from tfgptopt.pruning.patterns import Pattern, Unstructured
from tfgptopt.pruning.pruner import Pruner
from tfgptopt.pruning.schedules import ConstantSparsity, Threshold
from tfgptopt.pruning.scores import Magnitude, Movement, Score
from tfgptopt.pruning.sparsegpt import SparseGPT
from tfgptopt.pruning.sparsity_allocation import Allocation
from tfgptopt.pruning.technique import Prune
from tfgptopt.terminal.progress import Verbose, check_verbose, showing


def prune(
    model: keras.Layer,
    sparsity: float | None = None,
    pattern: Pattern = Unstructured(),
    score: Score | SparseGPT = Magnitude(),
    targets: Selector | None = None,
    allocation: Allocation | None = None,
    verbose: Verbose = "auto",
    threshold: float | Threshold | None = None,
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
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.
        threshold: In the place of `sparsity`: a magnitude below which weights go, or a `Threshold`
            whose value is relative to each weight and whose share is bounded. Defaults to `None`.

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
    if threshold is not None:
        if sparsity is not None:
            raise ValueError(f"Give `sparsity` or `threshold`. Received: {sparsity}, {threshold}")
        technique = Prune(_at_once(threshold), pattern, score, targets, allocation)
        _check_unpruned(technique.check(model))
        _prune_now(model, technique, verbose)
        return model
    if sparsity is None:
        sparsity = getattr(pattern, "sparsity", None)
    if not isinstance(sparsity, Real) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"`sparsity` must be a number in [0, 1). Received: {sparsity!r}")
    if isinstance(score, Movement):
        raise ValueError("Movement gathers in training: give it to the callback `Pruning`.")
    technique = Prune(
        ConstantSparsity(float(sparsity), 0, frequency=1), pattern, score, targets, allocation
    )
    check_verbose(verbose)
    chosen = technique.check(model)
    _check_unpruned(chosen)
    if isinstance(score, SparseGPT):
        with showing(verbose):
            _prune_by_sparsegpt(model, technique, score, chosen, float(sparsity))
        return model
    _prune_now(model, technique, verbose)
    return model


def _at_once(threshold: float | Threshold) -> Threshold:
    """Returns a threshold that is there from the first step on."""
    if isinstance(threshold, Threshold):
        return Threshold(threshold.threshold, threshold.relative_to, threshold.at_most)
    return Threshold(threshold)


def _check_unpruned(chosen: list[Target]) -> None:
    for target in chosen:
        if masks.masked(target.variable):
            raise ValueError(
                f"{target.path} is pruned already. Call `tfgptopt.finalize(model)` first to prune "
                "it again."
            )


def _prune_now(model: keras.Layer, technique: Prune, verbose: Verbose) -> None:
    check_verbose(verbose)
    pruner = Pruner(model, technique)
    try:
        with showing(verbose):
            pruner.advance(0)
    except BaseException:
        with changing(model):
            masks.remove(pruner.targets)
        raise


def _prune_by_sparsegpt(
    model: keras.Layer, technique: Prune, score: SparseGPT, chosen: list[Target], sparsity: float
) -> None:
    shares = [sparsity] * len(chosen)
    if technique.allocation is not None:
        shares = technique.allocation.at(sparsity, chosen)
    of_variable = {id(t.variable): share for t, share in zip(chosen, shares, strict=True)}
    before = {id(t.variable): keras.ops.convert_to_numpy(t.variable.value) for t in chosen}
    found: list[tuple[Target, np.ndarray]] = []
    with changing(model):
        try:
            found.extend(score.prune(model, chosen, of_variable, technique.pattern))
        except BaseException:
            for target in chosen:
                target.variable.assign(before[id(target.variable)])
            raise
        masks.attach(model, chosen, technique)
        for target, kept in found:
            target.variable.constraint.mask.assign(kept)
        masks.apply(chosen)
        mask_state(model)
