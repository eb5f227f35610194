"""Quantization without training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import Batches, batches_of, with_start
from tfgptopt.calibration.identity import checksum_of, words_of_data, words_of_model
from tfgptopt.calibration.journal import Journal, journal_in
from tfgptopt.calibration.routing import has_router
from tfgptopt.calibration.watching import observe_all
from tfgptopt.model.changing import changing, snapshot
from tfgptopt.model.current import current
from tfgptopt.model.finite import check_finite_weights
from tfgptopt.model.targets import Selector, Target
from tfgptopt.model.types import Data
from tfgptopt.quantization import layers, quantizers, rotation, rounding
from tfgptopt.quantization.aware import check_plain, check_setting, chosen_specs
from tfgptopt.quantization.balancing import Balance, balance
from tfgptopt.quantization.bit_allocation import BitAllocation
from tfgptopt.quantization.block_rounding import bytes_of_blocks, round_blocks
from tfgptopt.quantization.learned_rotation import rotate_learned
from tfgptopt.quantization.rotatable import rotatable
from tfgptopt.quantization.rotation import Rotate, turn_features, why_not_rotated
from tfgptopt.quantization.smoothing import find_pairs
from tfgptopt.quantization.sorting import sort_neurons
from tfgptopt.quantization.specs import Spec
from tfgptopt.terminal.progress import Verbose, check_verbose, showing, stage, track

Method = Literal["rtn", "mse", "gptq", "awq", "smoothquant", "rotation", "sorting", "auto"]

_ROTATION, _SORTING = "rotation", "sorting"
_ROUNDINGS = ("rtn", "mse", "gptq")
_BALANCES: tuple[Balance, ...] = ("awq", "smoothquant")
_FEWEST_TOKENS = 64


def quantize(
    model: keras.Layer,
    spec: Spec | BitAllocation,
    method: Method | Rotate | Sequence[Method | Rotate] = "rtn",
    data: Data = None,
    targets: Selector | None = None,
    verbose: Verbose = "auto",
    checkpoints: str | Path | None = None,
) -> keras.Layer:
    """Quantizes a model without training, in place.

    The model computes with rounded weights and rounded inputs afterwards, as after
    `quantize_aware`: `evaluate` shows the quality that ships, `tfgptopt.export` writes the same
    integers, and `fit` may train on, with the scales that were found. Pruned weights stay zero.

    Methods, which may be combined, `("rotation", "gptq")` for example:

    - `"rotation"`, or a `tfgptopt.quantization.Rotate` with settings: first turns the features of a
      decoder, so that none stands out; then rounds to nearest or as another method says. It needs
      no data, unless it is learned (`Rotate(steps=100)`), and helps most where activations are
      rounded.
    - `"sorting"`: first sorts the neurons of feed-forward networks by size, for a spec with
      `activation_blocks`; then rounds to nearest or as another method says.
    - `"rtn"`: rounds to nearest, with scales as the spec says.
    - `"mse"`: the same, with the scales of the smallest squared error.
    - `"gptq"`: rounds input by input and corrects the weights still to come, block by block through
      the model. Scales are those of the smallest error, weighted by the inputs.
    - `"auto"`: what is best for the bits of the spec (`docs/quantization.md`): rotation where the
      model allows it and all weights are rounded; then, with data, gptq, for int8 behind
      smoothquant and awq where the stream is not turned; without, round to nearest for int8, and
      the smallest error for int4.
    - `"awq"`, `"smoothquant"`: first move the scale of features between inputs and weights, where
      the model allows it; then round to nearest or as another method says. They help where a few
      features are much larger than others.

    Args:
        model: A built Keras 3 model.
        spec: `Int8()` or `Int4()`, or what `tfgptopt.quantization.allocate` returned.
        method: One of the names above, or several. Defaults to `"rtn"`.
        data: Calibration data for `"gptq"`, `"awq"`, `"smoothquant"`, `"sorting"` and learned
            rotations: a finite `tf.data.Dataset` or arrays, as `fit` takes them; some 30 windows of
            text or more. Each gets the start token in front that the model's preprocessor puts
            there.
        targets: Selector of the weights. Defaults to `None`: kernels of Dense and EinsumDense and
            tables of Embedding and ReversibleEmbedding, wherever they are nested.
        verbose: `"auto"`, 0, 1 or 2. 0 is silent, 1 shows progress bars with the time left, 2
            prints lines. Defaults to `"auto"`: bars in terminals and notebooks.
        checkpoints: Folder for what methods with data find, written behind each place, each block
            and a learned rotation: about a byte for each weight. The same call on the same model
            and data, in another process too, goes on where one was stopped, however that ended,
            and comes to the same weights and scales; behind the end it gives them at once. Nobody
            removes the folder. Defaults to `None`: nothing is written.

    Returns:
        The same model.

    Raises:
        ValueError: If a setting is unknown or does not fit, a layer is quantized already, data is
            missing, too little, or nothing the model can read, or `checkpoints` cannot be written
            to, is in use, or is of another model, spec, method or data. The model is as it was
            then.

    Example:

    ```python
    windows = corpus.train.take(32)
    tfgptopt.quantize(gpt, Int4(block_size=64), "gptq", windows)
    tfgptopt.export(gpt, "gpt.tflite")
    ```

    Reference: see `tfgptopt.quantization.gptq`, `tfgptopt.quantization.balancing` and
    `tfgptopt.quantization.rotation`.
    """
    check_setting(spec)
    check_verbose(verbose)
    sorts, turning, balances, final = _methods(
        _automatic(model, spec, data, targets) if method == "auto" else method
    )
    chosen = chosen_specs(model, spec, targets)
    check_finite_weights(model)
    check_plain([target for target, _ in chosen])
    learns = turning is not None and turning.steps > 0
    if data is None and (sorts or learns or balances or final == "gptq"):
        raise ValueError(f"`method={method!r}` needs calibration data. Received: data=None")
    # Read once: a generator serves, too.
    data = None if data is None else with_start(model, batches_of(data))
    restore = snapshot(model)
    was_turned, by_data = rotation.is_rotated(model), bool(balances) or final == "gptq"
    folder = checkpoints if by_data or learns else None
    found = (*((_SORTING,) if sorts else ()), *balances, final)
    identity = {} if folder is None else _identity(model, chosen, turning, found, data)
    room = bytes_of_blocks(chosen) if final == "gptq" else 0
    with journal_in(folder, identity, room) as journal, changing(model), showing(verbose):
        try:
            if sorts:
                sort_neurons(model, data)
            if turning is not None:
                _rotate(model, turning, chosen, data, journal)
            told = _told_by_data(model, chosen, by_data)
            _check_data(model, told, data)
            _balance(model, told, balances, data, journal)
            if final == "gptq":
                kernels = [(t, s) for t, s in told if t.role != "embedding"]
                round_blocks(model, kernels, data, journal)
            _round(chosen, final)
        except BaseException:
            for target, _ in chosen:
                if layers.is_dressed(target.layer):
                    layers.undress(target.layer)
                layers.forget(target.layer)
            if not was_turned:
                rotation.undo(model)
            restore()
            raise
    return model


def _identity(
    model: keras.Layer,
    chosen: list[tuple[Target, Spec]],
    turning: Rotate | None,
    methods: tuple[str, ...],
    data: Any,
) -> dict[str, str]:
    """Returns what has to be the same for a calibration to go on from checkpoints, in words."""
    places = {id(variable): i for i, variable in enumerate(model.weights)}
    by_place = checksum_of(f"{places.get(id(target.variable))} {one}" for target, one in chosen)
    specs = ", ".join(str(spec) for spec in dict.fromkeys(spec for _, spec in chosen))
    first = () if turning is None else (repr(turning),)
    return {
        "model": words_of_model(model),
        "spec": f"{specs} for {len(chosen)} weights ({by_place})",
        "method": " + ".join((*first, *methods)),
        "data": words_of_data(data),
    }


def _automatic(
    model: keras.Layer, spec: Spec | BitAllocation, data: Data, targets: Selector | None
) -> tuple[str, ...]:
    """Returns the methods that `docs/quantization.md` found best, for a model with its data."""
    specs = spec.specs.values() if isinstance(spec, BitAllocation) else [spec]
    wide = min(one.bits for one in specs if one is not None) >= 8
    # Rotation changes all weights, not some.
    turns = targets is None and why_not_rotated(model) is None
    first = (_ROTATION,) if turns else ()
    if data is None:
        return (*first, "rtn" if wide else "mse")
    if not wide:
        return (*first, "gptq")
    # Where the stream is turned, no feature is left that stands out.
    balances = () if turns and rotatable(model).is_free else ("smoothquant", "awq")
    return (*first, *balances, "gptq")


def reorders(method: Any) -> bool:
    """Returns whether a method rotates or sorts: weights mean something else then.

    Raises:
        ValueError: If it is none.
    """
    if method == "auto":
        return True
    sorts, turning, *_ = _methods(method)
    return sorts or turning is not None


def needs_data(method: Any) -> bool:
    """Returns whether a method reads calibration data.

    Raises:
        ValueError: If it is none.
    """
    sorts, _, balances, final = _methods(method)
    return sorts or bool(balances) or final == "gptq"


def _methods(method: Any) -> tuple[bool, Rotate | None, list[Balance], str]:
    """Returns whether to sort and how to rotate first, what else to do, and how to round."""
    names = [method] if isinstance(method, str | Rotate) else list(method)
    turning = [one if isinstance(one, Rotate) else Rotate() for one in names
               if one == _ROTATION or isinstance(one, Rotate)]  # fmt: skip
    rest = [one for one in names if one != _ROTATION and not isinstance(one, Rotate)]
    final = [one for one in rest if one in _ROUNDINGS]
    known = (*_ROUNDINGS, *_BALANCES, _SORTING)
    unknown = [one for one in rest if one not in known]
    too_many = len(final) > 1 or len(turning) > 1 or len(set(rest)) < len(rest)
    if not names or unknown or too_many:
        raise ValueError(
            f"`method` must be 'auto', one of {(*known, _ROTATION)}, or several of them with at "
            f"most one of {_ROUNDINGS}. Received: {method!r}"
        )
    balances: list[Balance] = [one for one in rest if one in _BALANCES]
    return _SORTING in rest, next(iter(turning), None), balances, (final or ["rtn"])[0]


def _check_data(model: keras.Layer, chosen: list[tuple[Target, Spec]], data: Data) -> None:
    """Raises if calibration data is too little to tell anything, and warns if it tells little."""
    kernels = [target for target, _ in chosen if target.role != "embedding"]
    if data is None or not kernels:
        return
    seen = [0]

    def count(target: Target, rows: tf.Tensor) -> None:
        seen[0] += int(rows.shape[0])

    batches = batches_of(data)
    for batch in batches:
        observe_all(model, kernels[:1], Batches([batch]), count)
        if seen[0] >= max(target.matrix_shape[0] for target in kernels):
            return
    if seen[0] < _FEWEST_TOKENS:
        raise ValueError(
            f"The calibration data has {seen[0]} tokens, which is too little: give at least "
            f"{_FEWEST_TOKENS}, better some thousands."
        )
    widest = max(kernels, key=lambda target: target.matrix_shape[0])
    warnings.warn(
        f"The calibration data has {seen[0]} tokens, fewer than the {widest.matrix_shape[0]} inputs"
        f" of {widest.path}: it cannot tell all of them apart. Give more.",
        stacklevel=4,
    )


def _told_by_data(
    model: keras.Layer, chosen: list[tuple[Target, Spec]], read: bool
) -> list[tuple[Target, Spec]]:
    """Returns the weights that data tells something of, and warns of the others if it is read."""
    known = has_router(model, [target for target, _ in chosen])
    told = [pair for pair, known in zip(chosen, known, strict=True) if known]
    if read and len(told) < len(chosen):
        warnings.warn(
            f"{len(chosen) - len(told)} weights of experts are rounded without data: no router of "
            "a known family says which tokens each expert reads.",
            stacklevel=4,
        )
    return told


def _rotate(
    model: keras.Layer,
    turning: Rotate,
    chosen: list[tuple[Target, Spec]],
    data: Any,
    journal: Journal,
) -> None:
    """Turns the features of a model, by a matrix that is learned where that is asked for."""
    if turning.steps:
        rotate_learned(model, turning, chosen, data, journal)
        return
    with stage("Rotating"):
        turn_features(model, turning)


def _balance(
    model: keras.Layer,
    chosen: list[tuple[Target, Spec]],
    kinds: list[Balance],
    data: Data,
    journal: Journal,
) -> None:
    """Moves scales between inputs and weights, by one method after the other."""
    if not kinds:
        return
    kernels = [target for target, _ in chosen if target.role != "embedding"]
    with stage("Looking where scales can be moved"):
        known = journal.known("pairs")
        tried = journal.read("pairs", 1)["tried"].tolist() if known else []
        pairs = find_pairs(model, kernels, batches_of(data)[0], tried)
        if not known:
            journal.write("pairs", 1, {"tried": np.asarray(tried, bool)})
    scaled = {id(target.variable) for pair in pairs for target in pair.consumers}
    fixed = [t for t in kernels if t.expert_axis is not None and id(t.variable) not in scaled]
    if fixed:
        warnings.warn(
            f"{' and '.join(kinds)} move no scales of what {len(fixed)} weights of experts read, "
            f"such as {fixed[0].path}: routers read it too, or it is no linear function.",
            stacklevel=3,
        )
    for kind in kinds:
        balance(model, chosen, pairs, data, kind, journal)


def _round(chosen: list[tuple[Target, Spec]], final: str) -> None:
    """Dresses the chosen layers, with the scales that a method finds."""
    for target, spec in track(chosen, "Rounding"):
        if layers.is_dressed(target.layer):
            continue
        layers.dress(target, spec)
        for quantizer in quantizers.quantizers_of(target.layer):
            weights = current(target.layer, quantizer.variable)
            if final != "rtn":
                quantizer.hold(weights, rounding.mse_scale(weights, quantizer.grid))
            elif spec.scale == "learned":
                quantizer.hold(weights)
