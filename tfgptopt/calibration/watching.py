"""What goes into the layers of a model while it reads data: one pass that methods share.

Wanda and SparseGPT read it, and so can other one-shot methods. It works on any Keras model: the
layers' own `call` is watched while the model runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import batches_of, first_row
from tfgptopt.calibration.routing import Routing
from tfgptopt.model.overriding import overriding
from tfgptopt.model.targets import Target
from tfgptopt.model.turning import turns_of
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import Stage

# Receives a target and the rows that its matrix multiplies, float32 `(rows, inputs)`.
Observer = Callable[[Target, tf.Tensor], None]


class Enough(Exception):
    """Ends a forward pass where all that is wanted has been seen.

    What comes behind, the head above all, is not computed: with a large vocabulary it is most of
    the work.
    """


def check_kernels(chosen: list[Target]) -> None:
    """Raises unless each target is one matrix that multiplies rows of its layer's input.

    Raises:
        ValueError: If one is a table, or its equation multiplies with several matrices.
    """
    for target in chosen:
        if target.role == "embedding":
            raise ValueError(f"{target.path} is a table: it multiplies nothing to calibrate with.")
        if target.expert_axis is not None:
            continue  # One matrix for each expert, see `Routing`.
        equation = getattr(target.layer, "equation", "").replace(" ", "")
        if not equation:
            continue
        operands, result = equation.split("->")
        inputs, kernel = operands.split(",")
        shared = set(inputs) & set(kernel) & set(result) - {"."}
        lost = set(inputs) - set(kernel) - set(result) - {"."}
        if shared or lost:
            raise ValueError(
                f"{target.path} computes '{equation}', which is no product of rows with one "
                "matrix: calibration cannot tell what each weight meets. Leave it out with "
                "`targets`, or use `Magnitude()`."
            )


def _rows(target: Target, inputs: tf.Tensor) -> tf.Tensor:
    """Returns what the product of a layer reads as float32 `(rows, inputs)`."""
    turn = turns_of(target.layer).before
    inputs = inputs if turn is None else turn.of(inputs)
    rank = len(inputs.shape)
    contracted = [axis % rank for axis in target.row_axes]
    others = [axis for axis in range(rank) if axis not in contracted]
    moved = tf.transpose(inputs, others + contracted)
    return tf.cast(tf.reshape(moved, (-1, target.matrix_shape[0])), tf.float32)


@contextmanager
def watching(
    chosen: list[Target],
    observe: Observer,
    batch: Data,
    routing: Routing,
    until: keras.Layer | None = None,
) -> Iterator[None]:
    """Calls `observe` with what each target's layer reads, while the model runs eagerly.

    Layers that read the same tensor one after the other (query, key and value do) are given the
    same rows, the same object. Of experts each is shown by itself, as a target of `Target.parts`,
    with the rows of the tokens that its router sends to it. Rows of padding are left out.

    Args:
        chosen: Kernels; tables have no rows of inputs.
        observe: Called with a target and its rows, at every call of its layer.
        batch: What the model reads.
        routing: Of this model and these targets.
        until: The forward pass ends where it calls this layer, see `end_of`. Defaults to `None`:
            it runs to its end.
    """
    last: list[Any] = [None, None, None]
    real = _real(batch)
    observe = observe if real is None else _without_padding(observe, real)

    def wrap(target: Target) -> Any:
        layer, call = target.layer, target.layer.call

        def watched(inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
            how = target.row_axes, turns_of(layer).before
            if inputs is not last[0] or how != last[1]:
                last[:] = inputs, how, _rows(target, inputs)
            observe(target, last[2])
            return call(inputs, *args, **kwargs)

        def each_watched(inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
            for part, rows in routing.rows(target, inputs):
                observe(part, rows)
            return call(inputs, *args, **kwargs)

        return watched if target.expert_axis is None else each_watched

    calls = {id(target.layer): (target.layer, wrap(target)) for target in chosen}
    for key, router in routing.routers.items():  # A router may be a target, too.
        _, call = calls.get(key, (router, router.call))
        calls[key] = router, routing.listening(router, call, real)
    overrides = [(layer, "call", call) for layer, call in calls.values()]
    if until is not None:
        overrides.append((until, "call", _stop))
    with overriding(overrides), suppress(Enough):
        yield


def _stop(*args: object, **kwargs: object) -> Any:
    raise Enough


def end_of(model: keras.Layer, chosen: list[Target], batch: Data) -> keras.Layer | None:
    """Returns a layer that a model calls only after it has called those of all targets.

    It is where a forward pass may end, however often layers are called before; such as the norm in
    front of the head.

    Args:
        model: A built Keras 3 model.
        chosen: Targets of it.
        batch: Inputs of the model.

    Returns:
        The first such layer, or `None` if there is none.

    Raises:
        ValueError: If the model cannot read the batch.
    """
    order: list[keras.Layer] = []

    def noted(layer: keras.Layer) -> Any:
        call = layer.call

        def called(*args: object, **kwargs: object) -> Any:
            order.append(layer)
            return call(*args, **kwargs)

        return called

    inside = [layer for layer in model._flatten_layers() if layer is not model]
    with overriding((layer, "call", noted(layer)) for layer in inside):
        short(model, batch)  # Tries the part, which is all that is wanted of it.
    wanted = {id(target.layer) for target in chosen}
    last = max((i for i, layer in enumerate(order) if id(layer) in wanted), default=len(order))
    before = {id(layer) for layer in order[: last + 1]}
    return next((layer for layer in order[last + 1 :] if id(layer) not in before), None)


def advancing(observe: Observer, shown: Stage, work: Callable[[Target], float]) -> Observer:
    """Returns an observer that also says how far a stage is.

    Args:
        observe: The observer.
        shown: The stage.
        work: Returns how much of the stage's work one row of a target is.
    """

    def observed(target: Target, rows: tf.Tensor) -> None:
        observe(target, rows)
        shown.advance(work(target) * int(rows.shape[0]))

    return observed


def observe_all(model: keras.Layer, chosen: list[Target], data: Data, observe: Observer) -> None:
    """Shows an observer what goes into all targets, in one pass over data.

    Args:
        model: A built Keras 3 model.
        chosen: Kernels of it.
        data: See `batches_of`.
        observe: Called with a target and its rows, those of padding left out.

    Raises:
        ValueError: If there is no data, or the model cannot read it.
    """
    check_kernels(chosen)
    batches = batches_of(data)
    until, routing = end_of(model, chosen, batches[0]), Routing(model, chosen)
    for batch in batches:
        with watching(chosen, observe, batch, routing, until):
            call_on(model, batch)


def call_on(model: keras.Layer, batch: Data) -> Any:
    """Calls a model on calibration data.

    Raises:
        ValueError: If it cannot read it.
    """
    try:
        return model(batch, training=False)
    except Enough:
        raise
    except Exception as error:
        shapes = tf.nest.map_structure(lambda leaf: tuple(np.shape(leaf)), batch)
        raise ValueError(
            f"The model '{model.name}' cannot read the calibration data, with batches of shape "
            f"{shapes}: {error}"
        ) from error


def short(model: keras.Layer, batch: Data) -> Any:
    """Returns a part of a batch that is enough to see how a model calls its layers.

    It spares the head most of its work. Where a model reads one shape only, it is all of the batch.

    Raises:
        ValueError: If the model cannot read the batch.
    """
    part = first_row(batch)
    try:
        call_on(model, part)
    except ValueError:
        call_on(model, batch)
        return batch
    return part


def _real(batch: Data) -> tf.Tensor | None:
    """Returns which tokens of a batch are no padding, one after the other; `None` if all are."""
    mask = batch.get("padding_mask") if isinstance(batch, dict) else None
    if mask is None or np.asarray(mask).all():
        return None
    return tf.reshape(tf.cast(mask, tf.bool), (-1,))


def _without_padding(observe: Observer, real: tf.Tensor) -> Observer:
    """Returns an observer that is not shown the rows of padding tokens."""
    last: list[Any] = [None, None]

    def selecting(target: Target, rows: tf.Tensor) -> None:
        if target.expert is not None or rows.shape[0] != real.shape[0]:
            observe(target, rows)
            return
        if rows is not last[0]:
            last[:] = rows, tf.boolean_mask(rows, real)
        observe(target, last[1])

    return selecting
