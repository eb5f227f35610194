"""A model block by block: which targets each holds, and how one calls the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.calibration.batches import batches_of
from tfgptopt.calibration.routing import Routing
from tfgptopt.calibration.watching import (
    Enough,
    Observer,
    call_on,
    check_kernels,
    end_of,
    short,
    watching,
)
from tfgptopt.model.overriding import overriding
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Data

# Lets an observer see what goes into some targets, on all data.
Run = Callable[[Observer], None]


def _holders(layer: keras.Layer, wanted: set[int]) -> list[keras.Layer]:
    """Returns the layers, one beside the other, that hold the wanted layers: a GPT's blocks."""
    if id(layer) in wanted:
        return [layer]
    held = [(child, wanted & {id(x) for x in child._flatten_layers()}) for child in layer._layers]
    # What holds all that a child of it, its neighbour here, holds is passed over: Gemma 3n's
    # embedding of images and texts holds the decoder.
    inside = [
        child
        for child, found in held
        if found
        and not any(
            found == others and other is not child and other in child._flatten_layers()
            for other, others in held
        )
    ]
    return _holders(inside[0], wanted) if len(inside) == 1 else inside


def targets_by_block(model: keras.Layer, chosen: list[Target]) -> list[list[Target]]:
    """Returns targets by the block of the model that holds them, such as a decoder layer."""
    blocks = _holders(model, {id(target.layer) for target in chosen})
    groups = [[t for t in chosen if t.layer in (b, *b._flatten_layers())] for b in blocks]
    return [group for group in groups if group]


class _Recorder:
    """Records how blocks are called in one forward pass."""

    def __init__(self, blocks: list[keras.Layer], stop: bool) -> None:
        self.calls: list[tuple[keras.Layer, tuple[Any, ...], dict[str, Any], Any]] = []
        self._blocks = blocks
        self._stop = stop

    def _wrap(self, block: keras.Layer) -> Any:
        call = block.call

        def recorded(*args: object, **kwargs: object) -> Any:
            if self._stop:
                self.calls.append((block, args, kwargs, None))
                raise Enough
            result = call(*args, **kwargs)
            self.calls.append((block, args, kwargs, result))
            return result

        return recorded

    def run(self, model: keras.Layer, batch: Data) -> _Recorder:
        overrides = [(block, "call", self._wrap(block)) for block in self._blocks]
        with overriding(overrides), suppress(Enough):
            call_on(model, batch)
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
    model: keras.Layer, layers: list[keras.Layer], batch: Data
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
    model: keras.Layer, chosen: list[Target], data: Data
) -> Iterator[tuple[list[Target], Run]]:
    """Goes through the blocks of a model in the order of their calls.

    Yields the targets of a block, and a function that shows an observer what goes into them. The
    weights of a block may be changed before the next is asked for, which then sees what the
    changed block gives; who only changes blocks, and runs none, computes nothing. Where each block
    reads the result of the one before, as in a GPT, only the activations between two blocks are
    held; other models are run from the start each time.

    Args:
        model: A built Keras 3 model.
        chosen: Kernels of it.
        data: See `batches_of`.

    Yields:
        `(targets, run)`, where `run(observe)` calls `observe(target, rows)`.

    Raises:
        ValueError: If there is no data, the model cannot read it, or it does not call a target.
    """
    check_kernels(chosen)
    batches, routing = batches_of(data), Routing(model, chosen)
    # What a block holds must tell which tokens its experts read.
    blocks = _holders(model, {id(target.layer) for target in chosen} | set(routing.routers))
    first = _Recorder(blocks, stop=False).run(model, short(model, batches[0]))
    called = list({id(call[0]): call[0] for call in first.calls}.values())
    members = {id(b): [t for t in chosen if t.layer in (b, *b._flatten_layers())] for b in called}
    missing = [t.path for t in chosen if not any(t in group for group in members.values())]
    if missing:
        raise ValueError(f"The model does not call the layer of {missing[0]} on this data.")
    if not first.is_chain():
        for group in (members[id(block)] for block in called):
            if group:
                yield group, _run_model(model, group, batches)
        return
    states = _States(model, called, batches)
    for block in called:
        yield members[id(block)], _run_block(model, block, members[id(block)], batches, states)


class _States:
    """What goes into the blocks of a chain, one behind the other, for each batch of data.

    A block is called when what it gives is asked for: nothing is computed behind the last one that
    somebody looks at, nor in front of the first.
    """

    def __init__(self, model: keras.Layer, blocks: list[keras.Layer], batches: list[Any]) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self._states: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._at = 0

    def before(self, block: keras.Layer) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Returns the arguments of a block, which is none that was passed already."""
        if not self._states:
            for batch in self._batches:
                calls = _Recorder(self._blocks[:1], stop=True).run(self._model, batch).calls
                self._states.append(calls[0][1:3])
        while self._blocks[self._at] is not block:
            passed = self._blocks[self._at]
            for i, (args, kwargs) in enumerate(self._states):
                self._states[i] = ((passed(*args, **kwargs), *args[1:]), kwargs)
            self._at += 1
        return self._states


def _run_model(model: keras.Layer, chosen: list[Target], batches: list[Any]) -> Run:
    def run(observe: Observer) -> None:
        until, routing = end_of(model, chosen, batches[0]), Routing(model, chosen)
        for batch in batches:
            with watching(chosen, observe, batch, routing, until):
                call_on(model, batch)

    return run


def _run_block(
    model: keras.Layer,
    block: keras.Layer,
    chosen: list[Target],
    batches: list[Any],
    states: _States,
) -> Run:
    def run(observe: Observer) -> None:
        routing = Routing(model, chosen)
        for batch, (args, kwargs) in zip(batches, states.before(block), strict=True):
            with watching(chosen, observe, batch, routing):
                block(*args, **kwargs)

    return run
