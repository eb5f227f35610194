"""Learns by which matrix the stream of a decoder is turned, so that rounded inputs cost least.

A turned model learns one more turn on top. In floats it changes nothing, so the weights stay as
they are, and only what products read is turned, rounded and turned back: what is left of the turn
is what rounding costs. The matrix moves along the orthogonal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import Batches
from tfgptopt.calibration.journal import Journal
from tfgptopt.model.changing import changing, snapshot
from tfgptopt.model.overriding import Override, overriding
from tfgptopt.model.targets import Target, target_of
from tfgptopt.model.turning import turns_of
from tfgptopt.quantization.rotatable import Rotatable, check_rotatable, rotatable
from tfgptopt.quantization.rotation import Rotate, stream_turn, turn_features, undo
from tfgptopt.quantization.row_rounding import fake_quantize_rows
from tfgptopt.quantization.specs import Spec
from tfgptopt.terminal.progress import stage

# How far a step moves, as a share of what the matrix has; how much of it steps before decide.
_RATE, _MOMENTUM = 0.01, 0.9
_LEVELS = 255.0
_STAGE = "rotation"


def rotate_learned(
    model: keras.Layer,
    technique: Rotate,
    chosen: list[tuple[Target, Spec]],
    data: Batches,
    journal: Journal,
) -> None:
    """Turns the features of a decoder by a matrix that is learned, or was in a journal.

    It is for those who hold the weights themselves and put them back, as `turn_features` is.

    Args:
        model: A causal LM, which is changed.
        technique: What is turned, with `steps`.
        chosen: Its weights, with how they will be rounded.
        data: Texts.
        journal: Has the matrix, or is given it.

    Raises:
        ValueError: As `check_learnable` and `rotate`. The model may be turned half-way then.
    """
    if journal.known(_STAGE):
        turn_features(model, technique, journal.read(_STAGE, 1)["matrix"])
        return
    found = rotatable(model)
    check_rotatable(found)
    check_learnable(model, found, chosen)
    restore = snapshot(model)
    try:
        turn_features(model, replace(technique, steps=0))
        more = learn_turn(model, found, chosen, data, technique.steps)
    finally:
        with changing(model):
            undo(model)
            restore()
    first = stream_turn(found, technique).matrix.astype(np.float64)
    matrix = (first @ more).astype(np.float32)
    journal.write(_STAGE, 1, {"matrix": matrix})
    turn_features(model, technique, matrix)


def check_learnable(
    model: keras.Layer, found: Rotatable, chosen: list[tuple[Target, Spec]]
) -> None:
    """Raises unless a rotation of a model can be learned.

    Raises:
        ValueError: If its stream is not turned, no product rounds what it reads of it, or it gives
            no logits.
    """
    name = f"{type(model).__name__}: a learned rotation"
    if not found.is_free:
        raise ValueError(
            f"{name} turns the stream, and that of this family cannot be turned, for it has norms "
            "behind its branches. Use `Rotate(steps=0)`."
        )
    if not hasattr(model, "backbone"):
        raise ValueError(f"{name} goes by what a causal LM predicts, and this model gives none.")
    if not any(_rounds_inputs(target, chosen) for target in _readers(found)):
        raise ValueError(
            f"{name} makes rounded inputs cost less, and no product here rounds what it reads of "
            'the stream. Use `Rotate(steps=0)`, or `activations="dynamic"`.'
        )


def _readers(found: Rotatable) -> list[Target]:
    readers = [target for branch in found.branches for target in branch.readers]
    return [*readers, target_of(found.table)]


def _rounds_inputs(target: Target, chosen: list[tuple[Target, Spec]]) -> bool:
    return any(
        one.variable is target.variable and spec.activations is not None for one, spec in chosen
    )


def learn_turn(
    model: keras.Layer,
    found: Rotatable,
    chosen: list[tuple[Target, Spec]],
    data: Batches,
    steps: int,
) -> np.ndarray:
    """Returns by which matrix the stream of a turned model is turned once more.

    Each step reads one text, and goes along the gradient of how far predictions with rounded inputs
    are from those of the floats. Weights are not rounded, as GPTQ behind it moves them.

    Args:
        model: A causal LM that was rotated. It is not changed.
        found: Where its stream is.
        chosen: Its weights, with how they will be rounded: whose inputs are.
        data: Texts.
        steps: int. How many steps.

    Returns:
        float64 array `(width, width)`, orthogonal.

    Reference: Liu et al., 2024, "SpinQuant: LLM quantization with learned rotations"
    (https://arxiv.org/abs/2405.16406); Li et al., 2020, "Efficient Riemannian Optimization on the
    Stiefel Manifold via the Cayley Transform" (https://arxiv.org/abs/2002.01113).
    """
    texts = [
        tf.nest.map_structure(lambda leaf, i=i: tf.convert_to_tensor(leaf)[i : i + 1], batch)
        for batch in data
        for i in range(int(np.shape(tf.nest.flatten(batch)[0])[0]))
    ]
    order = np.random.default_rng(0).permutation(len(texts))
    turn = tf.Variable(np.eye(found.width, dtype=np.float32))
    step = _step(model, found, chosen, turn)
    matrix, momentum = np.eye(found.width), np.zeros((found.width, found.width))
    with stage("Learning a rotation", steps) as shown:
        for i in range(steps):
            divergence, gradient = step(texts[order[i % len(texts)]])
            new = _tangent(gradient.numpy().astype(np.float64), matrix, found.keeps_mean)
            momentum = _MOMENTUM * momentum + (1.0 - _MOMENTUM) * new
            rate = _RATE * 0.5 * (1.0 + math.cos(math.pi * i / steps))
            matrix = cayley(matrix, momentum, rate * math.sqrt(found.width))
            turn.assign(matrix)
            shown.say(f"Learning a rotation, divergence {float(divergence):.4f}")
            shown.advance()
    return matrix


def _tangent(gradient: np.ndarray, matrix: np.ndarray, keeps_mean: bool) -> np.ndarray:
    """Returns the direction in which an orthogonal matrix turns fastest: a skew matrix."""
    product = gradient @ matrix.T
    skew = product - product.T
    if keeps_mean:  # Nothing turns the row of ones.
        skew = skew - skew.mean(0, keepdims=True)
        skew = skew - skew.mean(1, keepdims=True)
    return skew / max(float(np.linalg.norm(skew)), 1e-30)


def cayley(matrix: np.ndarray, skew: np.ndarray, size: float) -> np.ndarray:
    """Returns an orthogonal matrix that was moved against a skew one, and is orthogonal.

    Args:
        matrix: float64 array `(n, n)`, orthogonal.
        skew: float64 array `(n, n)`, antisymmetric.
        size: float. How far it moves, as the norm of what is added.

    Returns:
        float64 array `(n, n)`.
    """
    half = skew * (0.5 * size / max(float(np.linalg.norm(skew)), 1e-30))
    one = np.eye(len(matrix))
    moved: np.ndarray = np.linalg.solve(one + half, (one - half) @ matrix)
    return moved


def _step(
    model: keras.Layer,
    found: Rotatable,
    chosen: list[tuple[Target, Spec]],
    turn: tf.Variable,
) -> Callable[[Any], tuple[tf.Tensor, tf.Tensor]]:
    """Returns a function that gives the divergence on a text, and its gradient."""

    def likely(text: Any) -> tf.Tensor:
        return tf.nn.log_softmax(tf.cast(model(text, training=False), tf.float32))

    @tf.function(reduce_retracing=True, autograph=False)
    def step(text: Any) -> tuple[tf.Tensor, tf.Tensor]:
        expected = likely(text)
        mask = text.get("padding_mask") if isinstance(text, dict) else None
        weights = tf.ones(tf.shape(expected)[:-1]) if mask is None else tf.cast(mask, tf.float32)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(turn)
            with overriding(_overrides(found, chosen, turn)):
                given = likely(text)
            each = tf.reduce_sum(tf.exp(expected) * (expected - given), -1)
            divergence = tf.reduce_sum(each * weights) / tf.reduce_sum(weights)
        return divergence, tape.gradient(divergence, turn)

    return step


def _overrides(
    found: Rotatable, chosen: list[tuple[Target, Spec]], turn: tf.Variable
) -> list[Override]:
    """Returns calls of layers on inputs that are rounded as they are when the stream is turned."""
    readers = {id(target.variable) for target in _readers(found)}
    last: list[Any] = [None, None]

    def turned(inputs: tf.Tensor) -> tf.Tensor:
        if last[0] is not inputs:  # Queries, keys and values read the same.
            rows = tf.linalg.matmul(tf.cast(inputs, tf.float32), turn)
            back = tf.linalg.matmul(_rounded(rows, (-1,)), turn, transpose_b=True)
            last[:] = inputs, tf.cast(back, inputs.dtype)
        return last[1]

    def wrap(target: Target) -> Any:
        call, before = target.layer.call, turns_of(target.layer).before

        def reads_stream(inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
            return call(turned(inputs), *args, **kwargs)

        def reads_other(inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
            rows = inputs if before is None else before.of(inputs)
            rows = _rounded(rows, target.row_axes)
            return call(rows if before is None else before.inverse.of(rows), *args, **kwargs)

        def head(inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
            reverse = bool(args[0]) if args else bool(kwargs.get("reverse", False))
            return call(turned(inputs) if reverse else inputs, *args, **kwargs)

        if target.role == "embedding":
            return head
        return reads_stream if id(target.variable) in readers else reads_other

    wanted = [target for target, spec in chosen if spec.activations is not None]
    table = found.positions
    return [(t.layer, "call", wrap(t)) for t in wanted if t.layer is not table]


def _rounded(rows: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """Returns rounded rows whose error grows with their range, for gradients too.

    The errors themselves are taken as they come; a row of a smaller range has smaller ones.
    """
    high = tf.maximum(tf.reduce_max(rows, axes, keepdims=True), 0.0)
    low = tf.minimum(tf.reduce_min(rows, axes, keepdims=True), 0.0)
    size = (high - low) / _LEVELS
    error = fake_quantize_rows(rows, axes) - rows
    share = tf.stop_gradient(tf.math.divide_no_nan(error, size))
    return rows + share * size
