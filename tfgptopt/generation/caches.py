"""KV caches that grow with their texts, and signatures that are resized to them.

A signature attends to all positions that a cache has room for, so that a short text must not have
a long cache. Files that cannot be resized have caches of the whole context.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel

from tfgptopt.quiet import quiet_native_logs

# Caches get so many positions, and so many more each time, or an eighth: they are copied then.
_STEP = 128

# The signature that appends positions to caches, and its inputs with what is appended.
_GROW = "grow"
_ROOM = ("room", "room_scale")


class Cache:
    """Keys and values of a text, and the tokens that they belong to.

    Attributes:
        buffers: LiteRT's buffers by name.
        positions: Positions that there is room for.
        tokens: The tokens that are held.
    """

    def __init__(self, buffers: dict[str, Any], positions: int) -> None:
        self.buffers = buffers
        self.positions = positions
        self.tokens: list[int] = []
        weakref.finalize(self, release, self.__dict__)

    def shared_with(self, tokens: Sequence[int]) -> int:
        """Returns how many tokens at the beginning are the same."""
        pairs = zip(self.tokens, tokens, strict=False)
        return next(
            (i for i, (held, wanted) in enumerate(pairs) if held != wanted),
            min(len(self.tokens), len(tokens)),
        )


class Caches:
    """Makes the caches of a model.

    Args:
        model: The model.
        name: A signature that reads a cache.
        context_length: Positions that a cache can have at most, and has in the file.
        resizable: Whether it can have fewer.
    """

    def __init__(
        self, model: CompiledModel, name: str, context_length: int, resizable: bool
    ) -> None:
        self._model = model
        self._name = name
        self._context_length = context_length
        self._resizable = resizable
        signatures = model.get_signature_list()
        self._inputs = {name: signatures[name]["inputs"] for name in signatures}
        self._positions = dict.fromkeys(signatures, context_length)
        self._shapes = {
            key: (*np.asarray(tensor["shape"])[[0, 2]].tolist(), np.dtype(tensor["dtype"]))
            for key, tensor in model.get_input_tensor_details(name).items()
            if key not in ("tokens", "position")
        }
        weakref.finalize(self, release, self.__dict__)

    def room_for(self, tokens: int) -> int:
        """Returns how many positions a cache of so many tokens should have."""
        if not self._resizable:
            return self._context_length
        room = _STEP
        while room < tokens:
            room += max(_STEP, room // 8 // _STEP * _STEP)
        return min(room, self._context_length)

    def new(self) -> Cache:
        """Returns an empty cache."""
        return self._empty(self.room_for(1))

    def copy(self, cache: Cache) -> Cache:
        """Returns a cache of its own with the same content."""
        copy = self._empty(cache.positions)
        self._copy_rows(cache, copy)
        copy.tokens = list(cache.tokens)
        return copy

    def shrink(self, cache: Cache, positions: int) -> None:
        """Gives a cache fewer positions, which its tokens fit into."""
        smaller = self._empty(positions)
        self._copy_rows(cache, smaller)
        cache.buffers, cache.positions = smaller.buffers, positions

    def fit(self, name: str, cache: Cache, end: int, expected: int) -> None:
        """Makes a cache large enough, and a signature fit it.

        Args:
            name: The signature.
            cache: The cache that it is going to read.
            end: Positions that it needs.
            expected: Positions that will be needed soon. The cache is at most doubled for them,
                since the tokens until then are read faster with less.
        """
        if cache.positions < end:
            doubled = min(self.room_for(expected), 2 * cache.positions)
            self._grow(cache, max(self.room_for(end), doubled))
        if self._positions[name] != cache.positions:
            self._resize(name, cache.positions)

    def _grow(self, cache: Cache, positions: int) -> None:
        room = positions - cache.positions
        self._resize(_GROW, cache.positions, room)
        with quiet_native_logs():
            inputs = dict(cache.buffers)
            for key in self._inputs[_GROW]:
                if key in _ROOM:
                    heads, size, dtype = self._shape(key)
                    inputs[key] = self._model.create_input_buffer_by_name(_GROW, key)
                    inputs[key].write(np.zeros((heads, room, size), dtype))
            outputs = {
                key: self._model.create_output_buffer_by_name(_GROW, key) for key in cache.buffers
            }
            self._model.run_by_name(_GROW, inputs, outputs)
        cache.buffers, cache.positions = outputs, positions

    def _resize(self, name: str, positions: int, room: int = 0) -> None:
        """Makes a signature take caches of so many positions, and append so many if it does."""
        index = self._model.get_signature_index(name)
        for i, key in enumerate(self._inputs[name]):
            if key in self._shapes or key in _ROOM:
                heads, size, _ = self._shape(key)
                shape = (heads, room if key in _ROOM else positions, size)
                self._model.resize_input_tensor(i, shape, index, strict=False)
        self._positions[name] = positions

    def _shape(self, key: str) -> tuple[int, int, Any]:
        """Returns heads, numbers for each position, and dtype of an input."""
        return self._shapes[{"room": "key_0", "room_scale": "key_scale_0"}.get(key, key)]

    def _empty(self, positions: int) -> Cache:
        """Returns a cache of zeros: where a mask gives no weight, NaN would still give NaN."""
        if self._positions[self._name] != positions:
            self._resize(self._name, positions)
        buffers = {}
        with quiet_native_logs():
            for key, (heads, size, dtype) in self._shapes.items():
                buffers[key] = self._model.create_input_buffer_by_name(self._name, key)
                # Fresh memory is zero, and takes no room until it is written to.
                held = buffers[key].read(heads * positions * size, dtype.type)
                if held.view(f"i{dtype.itemsize}").any():
                    buffers[key].write(np.zeros((heads, positions, size), dtype))
        return Cache(buffers, positions)

    def _copy_rows(self, cache: Cache, target: Cache) -> None:
        """Copies the rows of a cache's tokens."""
        count = len(cache.tokens)
        for key, (heads, size, dtype) in self._shapes.items() if count else ():
            held = cache.buffers[key].read(heads * cache.positions * size, dtype.type)
            rows = np.zeros((heads, target.positions, size), dtype)
            rows[:, :count] = held.reshape(heads, cache.positions, size)[:, :count]
            target.buffers[key].write(rows)


def release(native: dict[str, Any]) -> None:
    """Drops LiteRT's objects, which log their end."""
    with quiet_native_logs():
        native.clear()
