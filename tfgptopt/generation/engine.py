"""Runs the signatures of an exported decoder on KV caches that are updated in place."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Options
from ai_edge_litert.hardware_accelerator import HardwareAccelerator

from tfgptopt.generation import weight_cache
from tfgptopt.generation.container import Container
from tfgptopt.quiet import quiet_native_logs

# One call costs about as much as reading so many tokens more: the weights come from memory once.
_TOKENS_PER_CALL = 16


class Signature(NamedTuple):
    """What a signature reads at once, and how much of the cache it attends to, in tokens."""

    length: int
    window: int
    name: str


class Cache:
    """Keys and values of a text, and the tokens that they belong to."""

    def __init__(self, buffers: dict[str, Any]) -> None:
        self.buffers = buffers
        self.tokens: list[int] = []
        weakref.finalize(self, _release, self.__dict__)

    def shared_with(self, tokens: Sequence[int]) -> int:
        """Returns how many tokens at the beginning are the same."""
        pairs = zip(self.tokens, tokens, strict=False)
        return next(
            (i for i, (held, wanted) in enumerate(pairs) if held != wanted),
            min(len(self.tokens), len(tokens)),
        )


class Engine:
    """Reads tokens into caches and gives logits. Threads may share it: they take turns.

    Args:
        path: The `.tflite` file.
        container: What it says of itself.
        num_threads: Threads for the kernels.
        folder: Where packed weights are kept, or `None`.
    """

    def __init__(
        self, path: Path, container: Container, num_threads: int, folder: Path | None
    ) -> None:
        decoder, signatures = container.metadata["decoder"], container.metadata["signatures"]
        self.context_length: int = decoder["context_length"]
        self.vocabulary_size: int = decoder["vocabulary_size"]
        self._decode = _by_size(signatures["decode"])
        self._prefill = _by_size(signatures["prefill"])
        self._score = _by_size(signatures["score"])
        self._lock = threading.Lock()
        self._buffers: dict[str, Any] = {}
        weakref.finalize(self, _release, self.__dict__)

        def compiled(weights: str) -> CompiledModel:
            cpu = CpuOptions(num_threads=num_threads, xnnpack_weight_cache_path=weights)
            options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
            return CompiledModel.from_file(str(path), options=options)

        with quiet_native_logs():
            self._model = weight_cache.load(compiled, container.content_hash, folder)
        inputs = self._model.get_input_tensor_details(self._decode[0].name)
        self._cache_shapes = {
            name: (tuple(tensor["shape"]), np.dtype(tensor["dtype"]))
            for name, tensor in inputs.items()
            if name not in ("tokens", "position")
        }

    def new_cache(self) -> Cache:
        """Returns an empty cache."""
        name = self._decode[0].name
        with self._lock, quiet_native_logs():
            buffers = {
                key: self._model.create_input_buffer_by_name(name, key)
                for key in self._cache_shapes
            }
            for key, (shape, dtype) in self._cache_shapes.items():
                # A masked position must hold a finite number: zero weight times infinity is NaN.
                # Fresh memory is zero, and takes no room until it is written to.
                held = buffers[key].read(int(np.prod(shape)), dtype.type)
                if held.view(f"i{dtype.itemsize}").any():
                    buffers[key].write(np.zeros(shape, dtype))
        return Cache(buffers)

    def copy_cache(self, cache: Cache) -> Cache:
        """Returns a cache of its own with the same content."""
        copy = self.new_cache()
        with self._lock:
            for key, (shape, dtype) in self._cache_shapes.items():
                values = cache.buffers[key].read(int(np.prod(shape)), dtype.type)
                copy.buffers[key].write(values.reshape(shape))
            copy.tokens = list(cache.tokens)
        return copy

    def read(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Brings the tokens of a text into a cache, as far as it does not hold them."""
        del cache.tokens[cache.shared_with(tokens) :]
        lengths = (1, *(signature.length for signature in self._prefill))
        while (position := len(cache.tokens)) < len(tokens):
            length = _split(len(tokens) - position, lengths)
            if length == 1:
                self.decode(cache, tokens[position])
            else:
                self._chunk(self._prefill, length, cache, tokens, position)

    def decode(self, cache: Cache, token: int) -> np.ndarray:
        """Reads one token more; returns the logits behind it, float32 `(vocabulary,)`."""
        position = len(cache.tokens)
        signature = _narrowest(self._decode, 1, position + 1)
        logits = self._run(signature, cache, [token], position)
        cache.tokens.append(token)
        return logits

    def score(self, cache: Cache, tokens: Sequence[int]) -> np.ndarray:
        """Reads a text from its beginning; returns all logits, float32 `(tokens, vocabulary)`."""
        logits = np.empty((len(tokens), self.vocabulary_size), np.float32)
        position = 0
        while position < len(tokens):
            length = _split(len(tokens) - position, tuple(s.length for s in self._score))
            flat, end = self._chunk(self._score, length, cache, tokens, position)
            rows = flat.reshape(length, -1)
            start = min(position, self.context_length - length)
            logits[start:end] = rows[: end - start]
            position = end
        return logits

    def _chunk(
        self,
        signatures: list[Signature],
        length: int,
        cache: Cache,
        tokens: Sequence[int],
        position: int,
    ) -> tuple[np.ndarray, int]:
        """Reads tokens from a position on; returns logits, if any, and the position behind them.

        Near the end of the context it steps back and reads some tokens again, since a write past
        the end of the cache would be moved.
        """
        start = min(position, self.context_length - length)
        chunk = list(tokens[start : start + length])
        signature = _narrowest(signatures, length, start + length)
        del cache.tokens[start:]
        logits = self._run(signature, cache, chunk + [0] * (length - len(chunk)), start)
        cache.tokens += chunk
        return logits, start + len(chunk)

    def _run(
        self, signature: Signature, cache: Cache, tokens: list[int], position: int
    ) -> np.ndarray:
        """Runs a signature; returns its logits, which are empty if it has none."""
        with self._lock:
            inputs = {**self._inputs(signature), **cache.buffers}
            inputs["tokens"].write(np.asarray(tokens, np.int32))
            inputs["position"].write(np.asarray([position], np.int32))
            outputs = {**self._outputs(signature), **cache.buffers}
            self._model.run_by_name(signature.name, inputs, outputs)
            if "logits" not in outputs:
                return np.empty(0, np.float32)
            size = signature.length * self.vocabulary_size
            logits: np.ndarray = outputs["logits"].read(size, np.float32)
            return logits

    def _inputs(self, signature: Signature) -> dict[str, Any]:
        """Returns the buffers for tokens and position, which signatures of a length share."""
        key = f"tokens {signature.length}"
        if key not in self._buffers:
            create = self._model.create_input_buffer_by_name
            with quiet_native_logs():
                self._buffers[key] = {n: create(signature.name, n) for n in ("tokens", "position")}
        return dict(self._buffers[key])

    def _outputs(self, signature: Signature) -> dict[str, Any]:
        """Returns the buffer for logits, if there are any, which signatures of a length share."""
        if signature in self._prefill:
            return {}
        key = f"logits {signature.length}"
        if key not in self._buffers:
            create = self._model.create_output_buffer_by_name
            with quiet_native_logs():
                self._buffers[key] = {"logits": create(signature.name, "logits")}
        return dict(self._buffers[key])


@functools.lru_cache(maxsize=4096)
def _split(left: int, lengths: tuple[int, ...]) -> int:
    """Returns the length of the next chunk on the cheapest way to read what is left."""
    return _cheapest(left, tuple(sorted(set(lengths))))[1]


@functools.lru_cache(maxsize=4096)
def _cheapest(left: int, lengths: tuple[int, ...]) -> tuple[int, int]:
    """Returns the cost of reading so many tokens, and the length to begin with."""
    longest = lengths[-1]
    if left > 2 * longest:
        return 0, longest  # The cost of long texts is not compared with anything.
    costs = []
    for length in lengths:
        rest = _cheapest(left - length, lengths)[0] if left > length else 0
        costs.append((length + _TOKENS_PER_CALL + rest, length))
    # Of equal ones the longest, since the rest may be a chunk that is not full.
    return min(costs, key=lambda cost: (cost[0], -cost[1]))


def _narrowest(signatures: list[Signature], length: int, end: int) -> Signature:
    """Returns the signature of a length with the smallest window that covers a position."""
    return next(s for s in signatures if s.length == length and s.window >= end)


def _by_size(signatures: dict[str, list[int]]) -> list[Signature]:
    return sorted(Signature(length, window, name) for name, (length, window) in signatures.items())


def _release(native: dict[str, Any]) -> None:
    """Drops LiteRT's objects, which log their end."""
    with quiet_native_logs():
        native.clear()
