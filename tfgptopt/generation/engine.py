"""Runs the signatures of an exported decoder on KV caches that are updated in place."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import ai_edge_litert
import numpy as np
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Options
from ai_edge_litert.environment import Environment, EnvironmentOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator

from tfgptopt.file.container import Container
from tfgptopt.file.metadata import Carried, DecoderShape, Signature, Signatures
from tfgptopt.file.names import LOGITS, POSITIONS, TOKENS, WINDOW_START
from tfgptopt.generation import weight_cache
from tfgptopt.generation.batches import Batch
from tfgptopt.generation.caches import Buffers, Cache, Caches
from tfgptopt.terminal.quiet import quiet_native_logs

# One call costs about as much as reading so many tokens more: the weights come from memory once.
_TOKENS_PER_CALL = 16


class Engine:
    """Reads tokens into caches and gives logits. Threads may share it: they take turns.

    Args:
        model: What LiteRT loaded. `load` does it.
        lock: Held while it runs.
        decoder: What the file says of the decoder.
        signatures: What can be called.
    """

    def __init__(
        self,
        model: CompiledModel,
        lock: threading.Lock,
        decoder: DecoderShape,
        signatures: Signatures,
    ) -> None:
        self.context_length = decoder.context_length
        self.vocabulary_size = decoder.vocabulary_size
        self._decode = signatures.decode
        self._prefill, self._score = sorted(signatures.prefill), sorted(signatures.score)
        self._lock, self._model, self._decoder = lock, model, decoder
        with quiet_native_logs():
            self._inputs, self._outputs = self._new_buffers()
        self._chunk_length = max(s.length for s in (*self._prefill, *self._score))
        self._caches = Caches(self._model, self._decode.name, decoder, self._chunk_length)
        self._batch = {s.length: s for s in sorted(signatures.batch)}
        self._batch_caches = {1: self._caches}

    @classmethod
    def load(
        cls, path: Path, container: Container, num_threads: int, folder: Path | None
    ) -> Engine:
        """Returns the model of a file.

        Args:
            path: The `.tflite` or `.litertlm` file.
            container: What it says of itself.
            num_threads: Threads for the kernels.
            folder: Where packed weights are kept, or `None`.

        Raises:
            ValueError: If another file took the place of the one that was checked.
        """
        with weight_cache.model_file(path, container, folder) as file, quiet_native_logs():

            def compiled(weights: str) -> CompiledModel:
                cpu = CpuOptions(num_threads=num_threads, xnnpack_weight_cache_path=weights)
                options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
                model = CompiledModel.from_file(str(file), None, _environment(), options)
                container.check_unchanged(path)
                return model

            model = weight_cache.load(compiled, container.content_hash, folder)
        about = container.metadata
        return cls(model, threading.Lock(), about.decoder, about.signatures)

    def carried(self, draft: Carried) -> Engine:
        """Returns the smaller model that the same file carries."""
        return Engine(self._model, self._lock, draft.decoder, draft.signatures)

    def new_cache(self) -> Cache:
        """Returns an empty cache."""
        with self._lock:
            return self._caches.new()

    def copy_cache(self, cache: Cache) -> Cache:
        """Returns a cache of its own with the same content."""
        with self._lock:
            return self._caches.copy(cache)

    @property
    def batch_sizes(self) -> list[int]:
        """How many texts can be decoded together, in rising order."""
        return list(self._batch)

    def new_batch(self, size: int) -> Batch:
        """Returns empty slots for texts that are decoded together.

        Args:
            size: One of `batch_sizes`, or 1.
        """
        with self._lock:
            signature = self._batch.get(size, self._decode)
            if size not in self._batch_caches:  # They know to what the signature was resized.
                self._batch_caches[size] = Caches(
                    self._model, signature.name, self._decoder, self._chunk_length
                )
            caches = self._batch_caches[size]
            return Batch(self._model, self._lock, signature, caches, self._decoder)

    def read(self, cache: Cache, tokens: Sequence[int], whole: bool = False) -> None:
        """Brings the tokens of a text into a cache, as far as it does not hold them.

        Args:
            cache: The cache.
            tokens: The text.
            whole: Whether layers with a window keep all rows, as a batch needs them. Defaults to
                `False`.
        """
        self._read(cache, tokens, len(tokens), whole)
        if whole:
            with self._lock:
                self._caches.fit(self._decode.name, cache, len(tokens), len(tokens))

    def _read(
        self, cache: Cache, tokens: Sequence[int], expected: int, whole: bool = False
    ) -> None:
        """Reads tokens, and leaves room for so many as are expected in all."""
        shared = cache.shared_with(tokens)
        if not self._caches.can_go_on(cache, shared, whole):
            shared = cache.start = 0
        del cache.tokens[shared:]
        with self._lock:
            if not whole:
                self._caches.shrink(cache, expected)
        lengths = (1, *(signature.length for signature in self._prefill))
        while (position := len(cache.tokens)) < len(tokens):
            length = _split(len(tokens) - position, lengths)
            if length == 1:
                self.decode(cache, tokens[position], whole)
            else:
                self._chunk(self._prefill, length, cache, tokens, position, whole)

    def decode(self, cache: Cache, token: int, whole: bool = False) -> np.ndarray:
        """Reads one token more; returns the logits behind it, float32 `(vocabulary,)`.

        Args:
            cache: The cache, whose text it continues.
            token: The token.
            whole: As in `read`. Defaults to `False`.
        """
        position = len(cache.tokens)
        logits = self._run(self._decode, cache, [token], position, position + 1, whole)
        cache.tokens.append(token)
        return logits

    @property
    def verified_at_once(self) -> list[int]:
        """How many tokens `verify` reads in one call, in rising order."""
        return [signature.length for signature in self._score]

    def room(self, cache: Cache) -> int:
        """Returns how many tokens `verify` can read behind those of a cache."""
        left = self.context_length - len(cache.tokens)
        return max((length for length in self.verified_at_once if length <= left), default=0)

    def verify(self, cache: Cache, tokens: Sequence[int]) -> np.ndarray:
        """Reads some tokens more in one call; returns the logits behind each.

        Those that turn out to be wrong are taken back by cutting `cache.tokens`.

        Args:
            cache: The cache, whose text they continue.
            tokens: At most `room(cache)` tokens.

        Returns:
            float32 array `(tokens, vocabulary)`.
        """
        position = len(cache.tokens)
        signature = next(s for s in self._score if s.length >= len(tokens))
        filled = [*tokens, *[0] * (signature.length - len(tokens))]
        logits = self._run(signature, cache, filled, position, position + len(tokens))
        cache.tokens += tokens
        return logits.reshape(-1, self.vocabulary_size)[: len(tokens)]

    def score(self, cache: Cache, tokens: Sequence[int]) -> np.ndarray:
        """Reads a text; returns the logits behind each token, float32 `(tokens, vocabulary)`."""
        logits = np.empty((len(tokens), self.vocabulary_size), np.float32)
        position = 0
        for part in self.score_parts(cache, tokens):
            logits[position : position + len(part)] = part
            position += len(part)
        return logits

    def score_parts(
        self, cache: Cache, tokens: Sequence[int], first: int = 0
    ) -> Iterator[np.ndarray]:
        """Yields the logits behind tokens, some at a time, so that few are held.

        Args:
            cache: Where the text is read; of the tokens before `first` it may hold some already.
            tokens: The text.
            first: Number of the first token whose logits are wanted: those before it are read
                without the head. Defaults to `0`.

        Yields:
            float32 arrays `(tokens, vocabulary)`, which together are those of all from `first` on.
        """
        self._read(cache, tokens[:first], len(tokens))
        lengths = tuple(s.length for s in self._score)
        position = first
        while position < len(tokens):
            length = _split(len(tokens) - position, lengths)
            flat, start = self._chunk(self._score, length, cache, tokens, position)
            end = len(cache.tokens)
            yield flat.reshape(length, -1)[position - start : end - start]
            position = end

    def _chunk(
        self,
        signatures: list[Signature],
        length: int,
        cache: Cache,
        tokens: Sequence[int],
        position: int,
        whole: bool = False,
    ) -> tuple[np.ndarray, int]:
        """Reads tokens from a position on; returns logits, if any, and the position of the first.

        Where a chunk would not end within the cache that the text needs, it steps back and reads
        some tokens again: a write past the end would be moved, and padding needs no room.
        """
        end = min(position + length, len(tokens))
        limit = max(cache.positions, self._caches.room_for(end), length)
        start = min(position, limit - length)
        chunk = list(tokens[start : start + length])
        signature = next(s for s in signatures if s.length == length)
        del cache.tokens[start:]
        filled = chunk + [0] * (length - len(chunk))
        logits = self._run(signature, cache, filled, start, len(tokens), whole)
        cache.tokens += chunk
        return logits, start

    def _run(
        self,
        signature: Signature,
        cache: Cache,
        tokens: list[int],
        position: int,
        expected: int,
        whole: bool = False,
    ) -> np.ndarray:
        """Runs a signature; returns its logits, which are empty if it has none."""
        with self._lock:
            end, begin = position + signature.length, None if whole else position
            self._caches.fit(signature.name, cache, end, expected, begin)
            inputs = {**self._inputs[signature.name], **cache.buffers}
            if WINDOW_START in inputs:
                inputs[WINDOW_START].write(np.asarray([cache.start], np.int32))
            inputs[TOKENS].write(np.asarray(tokens, np.int32))
            inputs[POSITIONS].write(np.arange(position, position + len(tokens), dtype=np.int32))
            outputs = {**self._outputs[signature.name], **cache.buffers}
            self._model.run_by_name(signature.name, inputs, outputs)
            if LOGITS not in outputs:
                return np.empty(0, np.float32)
            size = signature.length * self.vocabulary_size
            logits: np.ndarray = outputs[LOGITS].read(size, np.float32)
            return logits

    def _new_buffers(self) -> tuple[dict[str, Buffers], dict[str, Buffers]]:
        """Returns the buffers of each signature for tokens and positions, and for logits."""
        inputs, outputs = {}, {}
        for signature in (self._decode, *self._prefill, *self._score):
            name = signature.name
            create = self._model.create_input_buffer_by_name
            start = (WINDOW_START,) if self._decoder.windowed_layers else ()
            inputs[name] = {key: create(name, key) for key in (TOKENS, POSITIONS, *start)}
            create = self._model.create_output_buffer_by_name
            keys = () if signature in self._prefill else (LOGITS,)
            outputs[name] = {key: create(name, key) for key in keys}
            # The first write makes LiteRT log once more.
            inputs[name][POSITIONS].write(np.zeros(signature.length, np.int32))
        return inputs, outputs


@functools.cache
def _environment() -> Environment:
    """Returns LiteRT's environment, one for all models: it logs its beginning and its end."""
    folder = str(Path(ai_edge_litert.__file__).parent)
    environment = Environment.create(options=EnvironmentOptions(runtime_path=folder))
    # Never freed: its end would be written to standard error.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))
    return environment


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
