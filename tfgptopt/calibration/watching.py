"""What goes into the layers of a model while it reads data: one pass that methods share.

Wanda and SparseGPT read it, and so can other one-shot methods. It works on any Keras model: the
layers' own `call` is watched while the model runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model.targets import Target

# Receives a target and the rows that its matrix multiplies, float32 `(rows, inputs)`.
Observer = Callable[[Target, tf.Tensor], None]
# Lets an observer see what goes into some targets, on all data.
Run = Callable[[Observer], None]


class _Enough(Exception):
    """Ends a forward pass at the first block, whose inputs are all that is wanted."""


def batches_of(data: Any) -> list[Any]:
    """Returns the inputs of each batch of a dataset, without labels and weights.

    Args:
        data: A `tf.data.Dataset` or another iterable of batches, or arrays, which are cut into
            batches of 32: `inputs`, or a tuple `(inputs, labels, weights)`, as a batch may be too.
            Inputs are an array or a dictionary of arrays.

    Returns:
        List of model inputs.

    Raises:
        ValueError: If there is no batch, a batch has no rows, or the dataset never ends.
    """
    if isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "The calibration dataset repeats forever. Give a finite one: `dataset.take(16)`."
        )
    if not isinstance(data, Iterable):
        raise ValueError(f"Calibration data is a tf.data.Dataset or arrays. Received: {data!r}")
    if isinstance(data, np.ndarray | tf.Tensor | dict | tuple):
        inputs = _cut(data[0] if isinstance(data, tuple) and data else data)
    else:
        inputs = [batch[0] if isinstance(batch, tuple) else batch for batch in data]
    if not inputs or any(0 in tf.shape(leaf) for x in inputs for leaf in tf.nest.flatten(x)):
        raise ValueError(f"The calibration data is empty. Received: {data!r}")
    return inputs


def _cut(arrays: Any) -> list[Any]:
    """Returns arrays as batches of 32 rows."""
    rows = max((len(leaf) for leaf in tf.nest.flatten(arrays)), default=0)
    return [
        tf.nest.map_structure(lambda leaf, at=at: leaf[at : at + 32], arrays)
        for at in range(0, rows, 32)
    ]


def check_kernels(targets: list[Target]) -> None:
    """Raises unless each target is one matrix that multiplies rows of its layer's input.

    Raises:
        ValueError: If one is a table, or its equation multiplies with several matrices.
    """
    for target in targets:
        if target.role == "embedding":
            raise ValueError(f"{target.path} is a table: it multiplies nothing to calibrate with.")
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


@contextmanager
def replaced_calls(layers: list[keras.Layer], wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Gives each layer another `call` for a while."""
    for layer in layers:
        # Not through Keras' own __setattr__: there is nothing to track.
        object.__setattr__(layer, "call", wrap(layer))
    try:
        yield
    finally:
        for layer in layers:
            object.__delattr__(layer, "call")


def _rows(target: Target, inputs: tf.Tensor) -> tf.Tensor:
    """Returns the input of a layer as float32 `(rows, inputs)`."""
    rank = len(inputs.shape)
    contracted = [axis % rank for axis in target.row_axes]
    others = [axis for axis in range(rank) if axis not in contracted]
    moved = tf.transpose(inputs, others + contracted)
    return tf.cast(tf.reshape(moved, (-1, target.matrix_shape[0])), tf.float32)


@contextmanager
def watching(targets: list[Target], observe: Observer) -> Iterator[None]:
    """Calls `observe` with what each target's layer reads, while the model runs eagerly.

    Layers that read the same tensor one after the other (query, key and value do) are given the
    same rows, the same object.

    Args:
        targets: Kernels; tables have no rows of inputs.
        observe: Called with a target and its rows, at every call of its layer.
    """
    by_layer = {id(target.layer): target for target in targets}
    last: list[Any] = [None, None, None]

    def wrap(layer: keras.Layer) -> Any:
        call, target = layer.call, by_layer[id(layer)]

        def watched(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if inputs is not last[0] or target.row_axes != last[1]:
                last[:] = inputs, target.row_axes, _rows(target, inputs)
            observe(target, last[2])
            return call(inputs, *args, **kwargs)

        return watched

    with replaced_calls([target.layer for target in targets], wrap):
        yield


def observe_all(model: keras.Layer, targets: list[Target], data: Any, observe: Observer) -> None:
    """Shows an observer what goes into all targets, in one pass over data.

    Args:
        model: A built Keras 3 model.
        targets: Kernels of it.
        data: See `batches_of`.
        observe: Called with a target and its rows, those of padding left out.

    Raises:
        ValueError: If there is no data, or the model cannot read it.
    """
    check_kernels(targets)
    for batch in batches_of(data):
        with watching(targets, _without_padding(observe, batch)):
            _call(model, batch)


def _call(model: keras.Layer, batch: Any) -> Any:
    """Calls a model on calibration data.

    Raises:
        ValueError: If it cannot read it.
    """
    try:
        return model(batch, training=False)
    except _Enough:
        raise
    except Exception as error:
        shapes = tf.nest.map_structure(lambda leaf: tuple(np.shape(leaf)), batch)
        raise ValueError(
            f"The model '{model.name}' cannot read the calibration data, with batches of shape "
            f"{shapes}: {error}"
        ) from error


def _without_padding(observe: Observer, batch: Any) -> Observer:
    """Returns an observer that is not shown the rows of padding tokens."""
    mask = batch.get("padding_mask") if isinstance(batch, dict) else None
    if mask is None or np.asarray(mask).all():
        return observe
    real = tf.reshape(tf.cast(mask, tf.bool), (-1,))
    last: list[Any] = [None, None]

    def selecting(target: Target, rows: tf.Tensor) -> None:
        if rows.shape[0] != real.shape[0]:
            observe(target, rows)
            return
        if rows is not last[0]:
            last[:] = rows, tf.boolean_mask(rows, real)
        observe(target, last[1])

    return selecting


def _holders(layer: keras.Layer, wanted: set[int]) -> list[keras.Layer]:
    """Returns the layers, one beside the other, that hold the wanted layers: a GPT's blocks."""
    if id(layer) in wanted:
        return [layer]
    inside = [
        child
        for child in layer._layers
        if any(id(inner) in wanted for inner in (child, *child._flatten_layers()))
    ]
    return _holders(inside[0], wanted) if len(inside) == 1 else inside


def blocks_of(model: keras.Layer, targets: list[Target]) -> list[list[Target]]:
    """Returns targets by the block of the model that holds them, such as a decoder layer."""
    blocks = _holders(model, {id(target.layer) for target in targets})
    groups = [[t for t in targets if t.layer in (b, *b._flatten_layers())] for b in blocks]
    return [group for group in groups if group]


class _Recorder:
    """Records how blocks are called in one forward pass."""

    def __init__(self, blocks: list[keras.Layer], stop: bool) -> None:
        self.calls: list[tuple[keras.Layer, tuple[Any, ...], dict[str, Any], Any]] = []
        self._blocks = blocks
        self._stop = stop

    def _wrap(self, block: keras.Layer) -> Any:
        call = block.call

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._stop:
                self.calls.append((block, args, kwargs, None))
                raise _Enough
            result = call(*args, **kwargs)
            self.calls.append((block, args, kwargs, result))
            return result

        return recorded

    def run(self, model: keras.Layer, batch: Any) -> _Recorder:
        with replaced_calls(self._blocks, self._wrap), suppress(_Enough):
            _call(model, batch)
        return self

    def is_chain(self) -> bool:
        """Returns whether each block reads the result of the one before, all else the same."""
        if len(self.calls) != len(self._blocks) or not self.calls:
            return False
        _, first_args, first_kwargs, _ = self.calls[0]
        for (_, _, _, result), (_, args, kwargs, _) in zip(
            self.calls, self.calls[1:], strict=False
        ):
            same_rest = _same(args[1:], first_args[1:]) and _same(kwargs, first_kwargs)
            if not args or args[0] is not result or not same_rest:
                return False
        return bool(first_args)


def recorded_calls(
    model: keras.Layer, layers: list[keras.Layer], batch: Any
) -> list[tuple[keras.Layer, tuple[Any, ...], Any]]:
    """Runs a model on one batch, and returns the calls of some of its layers in their order.

    Args:
        model: A built Keras 3 model.
        layers: Layers inside it.
        batch: Inputs of the model.

    Returns:
        List of `(layer, arguments, result)`, the very objects that were passed.
    """
    calls = _Recorder(layers, stop=False).run(model, batch).calls
    return [(layer, args, result) for layer, args, _, result in calls]


def _same(one: Any, other: Any) -> bool:
    one, other = tf.nest.flatten(one), tf.nest.flatten(other)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def block_by_block(
    model: keras.Layer, targets: list[Target], data: Any
) -> Iterator[tuple[list[Target], Run]]:
    """Goes through the blocks of a model in the order of their calls.

    Yields the targets of a block, and a function that shows an observer what goes into them. The
    weights of a block may be changed before the next is asked for, which then sees what the
    changed block gives. Where each block reads the result of the one before, as in a GPT, only
    the activations between two blocks are held; other models are run from the start each time.

    Args:
        model: A built Keras 3 model.
        targets: Kernels of it.
        data: See `batches_of`.

    Yields:
        `(targets, run)`, where `run(observe)` calls `observe(target, rows)`.

    Raises:
        ValueError: If there is no data, the model cannot read it, or it does not call a target.
    """
    check_kernels(targets)
    batches = batches_of(data)
    blocks = _holders(model, {id(target.layer) for target in targets})
    first = _Recorder(blocks, stop=False).run(model, batches[0])
    called = list({id(call[0]): call[0] for call in first.calls}.values())
    members = {id(b): [t for t in targets if t.layer in (b, *b._flatten_layers())] for b in called}
    missing = [t.path for t in targets if not any(t in group for group in members.values())]
    if missing:
        raise ValueError(f"The model does not call the layer of {missing[0]} on this data.")
    if not first.is_chain():
        for block in called:
            yield members[id(block)], _run_model(model, members[id(block)], batches)
        return
    states = []
    for batch in batches:
        _, args, kwargs, _ = _Recorder(called[:1], stop=True).run(model, batch).calls[0]
        states.append((args, kwargs))
    for block in called:
        yield members[id(block)], _run_block(block, members[id(block)], batches, states)
        if block is not called[-1]:
            for i, (args, kwargs) in enumerate(states):
                states[i] = ((block(*args, **kwargs), *args[1:]), kwargs)


def _run_model(model: keras.Layer, targets: list[Target], batches: list[Any]) -> Run:
    def run(observe: Observer) -> None:
        for batch in batches:
            with watching(targets, _without_padding(observe, batch)):
                _call(model, batch)

    return run


def _run_block(
    block: keras.Layer, targets: list[Target], batches: list[Any], states: list[Any]
) -> Run:
    def run(observe: Observer) -> None:
        for batch, (args, kwargs) in zip(batches, states, strict=True):
            with watching(targets, _without_padding(observe, batch)):
                block(*args, **kwargs)

    return run
