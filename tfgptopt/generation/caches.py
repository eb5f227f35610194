"""KV caches that grow with their texts, and signatures that are resized to them.

A signature attends to all positions that a cache has room for, so that a short text must not have
a long cache. Files that cannot be resized have caches of the whole context. Layers with a window
hold the rows of the last positions alone: when their room is full, these are moved to its front.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.tensor_buffer import TensorBuffer

from tfgptopt.file.metadata import DecoderShape
from tfgptopt.file.names import (
    GROW,
    KEYS,
    PLACE,
    POSITIONS,
    ROOM,
    START,
    TEXT,
    TOKENS,
    WINDOW_START,
    in_layer,
    window_positions,
)

Buffers = dict[str, TensorBuffer]

# Positions of a new cache, and the least that it grows by; from 2,048 on, an eighth.
_STEP = 128


def alike(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns with how many tokens two texts begin alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


class Cache:
    """Keys and values of a text, and the tokens that they belong to.

    Attributes:
        buffers: LiteRT's buffers by name.
        positions: Positions that there is room for.
        windowed: Positions that there is room for in layers with a window.
        start: The position of the first row of these layers.
        tokens: The tokens that are held.
    """

    def __init__(self, buffers: Buffers, positions: int, windowed: int) -> None:
        self.buffers = buffers
        self.positions = positions
        self.windowed = windowed
        self.start = 0
        self.tokens: list[int] = []

    def shared_with(self, tokens: Sequence[int]) -> int:
        """Returns how many of the first tokens are those that are held."""
        return alike(self.tokens, tokens)


@contextlib.contextmanager
def _all_or_nothing(cache: Cache) -> Iterator[None]:
    """Forgets what a cache holds if its layers could not all be changed alike."""
    try:
        yield
    except BaseException:
        cache.buffers, cache.positions, cache.windowed, cache.start = {}, 0, 0, 0
        cache.tokens = []
        raise


class IdleCache:
    """Lends a cache, the one that was used last if it is free. Threads may share it.

    Args:
        create: Makes another one.
    """

    def __init__(self, create: Callable[[], Cache]) -> None:
        self._create = create
        self._idle: Cache | None = None
        # Reentrant: a stream that is thrown away gives its cache back whenever Python collects it.
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def lent(self) -> Iterator[Cache]:
        """Lends the cache."""
        with self._lock:
            cache, self._idle = self._idle, None
        cache = cache or self._create()
        try:
            yield cache
        finally:
            with self._lock:
                self._idle = cache

    def forget(self) -> None:
        """Forgets what was used last."""
        with self._lock:
            self._idle = None


class Caches:
    """Makes the caches of a model.

    Args:
        model: The model.
        name: The signature whose buffers new caches are.
        decoder: What the file says of the decoder.
        chunk: Most tokens that are read in one call.

    Attributes:
        context_length: Most positions that a cache has.
    """

    def __init__(self, model: CompiledModel, name: str, decoder: DecoderShape, chunk: int) -> None:
        self._model = model
        self._name = name
        self.context_length = decoder.context_length
        self._resizable = decoder.resizable
        signatures = model.get_signature_list()
        self._inputs = {name: signatures[name]["inputs"] for name in signatures}
        # Positions that each signature takes, and those of layers with a window.
        self._sizes = dict.fromkeys(signatures, (self.context_length, self.context_length))
        # Rows that a token needs which is read, or read again, after stepping back.
        self._needed = decoder.window - 1 + chunk
        self._most_windowed = window_positions(decoder.window, chunk)
        self._windowed_layers = frozenset(decoder.windowed_layers)
        # Heads, numbers for each position, and dtype of each part of a cache.
        self._parts: dict[str, tuple[int, int, np.dtype[np.generic]]] = {}
        for key, tensor in model.get_input_tensor_details(name).items():
            if key not in (TOKENS, POSITIONS, WINDOW_START):
                heads, _, size = (int(n) for n in tensor["shape"])
                self._parts[key] = (heads, size, np.dtype(tensor["dtype"]))
        # Caches of one shape grow together.
        self._alike: dict[tuple[bool, int, int], list[int]] = {}
        for layer in range(decoder.num_layers):
            shape = self._parts[in_layer(KEYS, layer)][:2]
            kind = (layer in self._windowed_layers, *shape)
            self._alike.setdefault(kind, []).append(layer)

    def room_for(self, tokens: int) -> int:
        """Returns how many positions a cache of so many tokens should have."""
        if not self._resizable:
            return self.context_length
        room = _STEP
        while room < tokens:
            room += max(_STEP, room // 8 // _STEP * _STEP)
        return min(room, self.context_length)

    def new(self) -> Cache:
        """Returns an empty cache."""
        return self._empty(self.room_for(1))

    def copy(self, cache: Cache) -> Cache:
        """Returns a cache of its own with the same content."""
        copy = self._empty(cache.positions, cache.windowed)
        self._copy_rows(cache, copy)
        copy.tokens = list(cache.tokens)
        return copy

    def can_go_on(self, cache: Cache, tokens: int, whole: bool) -> bool:
        """Returns whether a cache has all rows that are needed behind so many of its tokens.

        Args:
            cache: The cache.
            tokens: How many of its tokens are to stay.
            whole: Whether all rows of all layers are needed.
        """
        return cache.start == 0 or (not whole and tokens - self._needed >= cache.start)

    def shrink(self, cache: Cache, tokens: int) -> None:
        """Makes a cache of a longer text smaller, for one that leaves a whole step of it free."""
        if cache.positions > self.room_for(tokens + _STEP):
            self._renew(cache, self.room_for(tokens))

    def fit(
        self, name: str, cache: Cache, end: int, expected: int, begin: int | None = None
    ) -> None:
        """Makes a cache large enough, and a signature fit it.

        Args:
            name: The signature.
            cache: The cache that it is going to read.
            end: Positions that it is going to touch.
            expected: Positions that will be needed soon. The cache is at most doubled for them,
                since the tokens until then are read faster with less.
            begin: The first position that it is going to write. Layers with a window then keep
                what is needed from there on. Defaults to `None`: they keep all.
        """
        if cache.positions == 0:  # It lost everything when its growth was interrupted.
            self._renew(cache, self.room_for(end))
        if cache.positions < end:
            doubled = min(self.room_for(expected), 2 * cache.positions)
            self._grow(cache, max(self.room_for(end), doubled))
        if self._windowed_layers:
            self._fit_windowed(cache, begin, end)
        if self._sizes[name] != (cache.positions, cache.windowed):
            self._resize(name, cache.positions, cache.windowed)

    def _fit_windowed(self, cache: Cache, begin: int | None, end: int) -> None:
        room = cache.positions
        if begin is not None:
            room = max(cache.windowed, min(room, self._most_windowed))
        if cache.windowed < room and (begin is None or end - cache.start > cache.windowed):
            self._grow_layers(cache, True, cache.windowed, room)
            cache.windowed = room
        if begin is not None and end - cache.start > cache.windowed:
            self._move_to_front(cache, max(begin - self._needed, 0))

    def _move_to_front(self, cache: Cache, start: int) -> None:
        """Lets layers with a window begin at a later position."""
        with _all_or_nothing(cache):
            for key, (heads, size, dtype) in self._parts.items():
                if self._is_windowed(key):
                    held = cache.buffers[key].read(heads * cache.windowed * size, dtype.type)
                    rows = held.reshape(heads, cache.windowed, size)
                    cache.buffers[key].write(np.roll(rows, cache.start - start, axis=1))
        cache.start = start

    def _is_windowed(self, key: str) -> bool:
        return int(key.rsplit("_", 1)[1]) in self._windowed_layers

    def _room(self, key: str, cache: Cache) -> int:
        """Returns the positions that a part of a cache has."""
        return cache.windowed if self._is_windowed(key) else cache.positions

    def fit_place(self, layer: int, cache: Cache, texts: int, positions: int) -> int:
        """Makes the signature that places a text fit a layer of a batch.

        Args:
            layer: The layer.
            cache: The cache of the batch.
            texts: How many it has.
            positions: Positions of the cache of the text.

        Returns:
            The heads of a text.
        """
        index, heads = self._model.get_signature_index(PLACE), 0
        for i, name in enumerate(self._inputs[PLACE]):
            if name != START:
                part = name.removeprefix(f"{TEXT}_")
                together, size, _ = self._parts[in_layer(part, layer)]
                heads = together // texts
                shape = (together, cache.positions, size)
                if part != name:
                    shape = (heads, positions, size)
                self._model.resize_input_tensor(i, shape, index, strict=False)
        return heads

    def some(self, cache: Cache, slots: Sequence[int], texts: int, target: Caches) -> Cache:
        """Returns a cache of a batch of another size, with the texts of some slots.

        Args:
            cache: A cache of a batch.
            slots: The slots, of which the first ones are filled.
            texts: How many slots the batch has.
            target: Makes caches of the other batch.
        """
        other = target._empty(cache.positions, cache.positions)
        for key, (heads, size, dtype) in self._parts.items():
            held = cache.buffers[key].read(heads * cache.positions * size, dtype.type)
            by_text = held.reshape(texts, heads // texts, cache.positions, size)
            rows = np.zeros((target._parts[key][0], cache.positions, size), dtype)
            rows[: len(slots) * (heads // texts)] = by_text[list(slots)].reshape(
                -1, cache.positions, size
            )
            other.buffers[key].write(rows)
        return other

    def _grow(self, cache: Cache, positions: int) -> None:
        """Gives a cache more positions, layer by layer, so that little is held twice."""
        self._grow_layers(cache, False, cache.positions, positions)
        cache.positions = positions
        if not self._windowed_layers:
            cache.windowed = positions

    def _grow_layers(self, cache: Cache, windowed: bool, before: int, positions: int) -> None:
        """Gives the layers with a window, or the others, more positions."""
        with _all_or_nothing(cache):
            for (kind, *_), layers in self._alike.items():
                if kind is windowed:
                    rooms = self._rooms_for(layers[0], before, positions - before)
                    for layer in layers:
                        self._grow_layer(cache, layer, rooms)

    def _rooms_for(self, layer: int, positions: int, extra: int) -> Buffers:
        """Fits the signature that grows to a layer; returns the zeros that it appends."""
        index = self._model.get_signature_index(GROW)
        rooms = {}
        for i, name in enumerate(self._inputs[GROW]):
            # Room is shaped as keys.
            heads, size, dtype = self._parts[in_layer(name.replace(ROOM, KEYS), layer)]
            count = extra if name.startswith(ROOM) else positions
            self._model.resize_input_tensor(i, (heads, count, size), index, strict=False)
            if name.startswith(ROOM):
                rooms[name] = self._model.create_input_buffer_by_name(GROW, name)
                rooms[name].write(np.zeros((heads, extra, size), dtype))
        return rooms

    def _grow_layer(self, cache: Cache, layer: int, rooms: Buffers) -> None:
        names = [name for name in self._inputs[GROW] if name not in rooms]
        inputs = {name: cache.buffers[in_layer(name, layer)] for name in names}
        outputs = {name: self._model.create_output_buffer_by_name(GROW, name) for name in names}
        self._model.run_by_name(GROW, {**inputs, **rooms}, outputs)
        for name, buffer in outputs.items():
            cache.buffers[in_layer(name, layer)] = buffer

    def _resize(self, name: str, positions: int, windowed: int) -> None:
        """Makes a signature take caches of so many positions."""
        self._sizes[name] = (0, 0)  # Unknown, if this is interrupted.
        index = self._model.get_signature_index(name)
        for i, key in enumerate(self._inputs[name]):
            if key in self._parts:
                heads, size, _ = self._parts[key]
                count = windowed if self._is_windowed(key) else positions
                self._model.resize_input_tensor(i, (heads, count, size), index, strict=False)
        self._sizes[name] = (positions, windowed)

    def _empty(self, positions: int, windowed: int | None = None) -> Cache:
        """Returns a cache of zeros: where a mask gives no weight, NaN would still give NaN."""
        if windowed is None:
            windowed = positions
            if self._windowed_layers:
                windowed = min(positions, self._most_windowed)
        if self._sizes[self._name] != (positions, windowed):
            self._resize(self._name, positions, windowed)
        cache = Cache({}, positions, windowed)
        for key, (heads, size, dtype) in self._parts.items():
            count, buffers = self._room(key, cache), cache.buffers
            buffers[key] = self._model.create_input_buffer_by_name(self._name, key)
            # Fresh memory is zero, and takes no room until it is written to.
            held = buffers[key].read(heads * count * size, dtype.type)
            if held.view(f"i{dtype.itemsize}").any():
                buffers[key].write(np.zeros((heads, count, size), dtype))
        return cache

    def _renew(self, cache: Cache, positions: int) -> None:
        """Gives a cache other buffers, with positions for its tokens at least."""
        fresh = self._empty(positions)
        self._copy_rows(cache, fresh)
        cache.buffers, cache.positions = fresh.buffers, positions
        cache.windowed, cache.start = fresh.windowed, fresh.start

    def _copy_rows(self, cache: Cache, target: Cache) -> None:
        """Copies the rows of a cache's tokens; of layers with a window, the last that fit."""
        end = len(cache.tokens)
        fits = end - cache.start <= target.windowed or not self._windowed_layers
        target.start = cache.start if fits else end - self._needed
        if end == 0:
            return
        for key, (heads, size, dtype) in self._parts.items():
            room, before = self._room(key, cache), 0
            first = 0
            if self._is_windowed(key):
                before, first = cache.start, target.start
            held = cache.buffers[key].read(heads * room * size, dtype.type)
            rows = np.zeros((heads, self._room(key, target), size), dtype)
            held = held.reshape(heads, room, size)[:, first - before : end - before]
            rows[:, : end - first] = held
            target.buffers[key].write(rows)
