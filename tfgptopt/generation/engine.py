"""Runs the signatures of an exported decoder on a KV cache that is updated in place."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Options
from ai_edge_litert.hardware_accelerator import HardwareAccelerator

from tfgptopt.quiet import quiet_native_logs


class Engine:
    """Reads tokens at a position and gives logits.

    Args:
        path: The `.tflite` file.
        decoder: The `decoder` part of its metadata.
        signatures: The `signatures` part of its metadata.
        num_threads: Threads for the kernels.
    """

    def __init__(
        self,
        path: Path,
        decoder: dict[str, Any],
        signatures: dict[str, dict[str, int]],
        num_threads: int,
    ) -> None:
        self.context_length: int = decoder["context_length"]
        self.vocabulary_size: int = decoder["vocabulary_size"]
        self._decode = _by_size(signatures["decode"])
        self._prefill = _by_size(signatures["prefill"])
        self._score = _by_size(signatures["score"])
        options = Options(
            hardware_accelerators=HardwareAccelerator.CPU,
            # Without a weight cache every signature would pack a copy of the weights.
            cpu_options=CpuOptions(num_threads=num_threads, xnnpack_weight_cache_path=":memory"),
        )
        weakref.finalize(self, _release, self.__dict__)
        with quiet_native_logs():
            self._model = CompiledModel.from_file(str(path), options=options)
            self._buffers = {name: self._io(name) for name in self._model.get_signature_list()}
            self._cache = self._make_cache(decoder)

    def _io(self, signature: str) -> dict[str, Any]:
        """Returns the buffers of a signature that are not part of the cache."""
        names = self._model.get_signature_list()[signature]
        buffers = {
            name: self._model.create_input_buffer_by_name(signature, name)
            for name in ("tokens", "position")
        }
        if "logits" in names["outputs"]:
            buffers["logits"] = self._model.create_output_buffer_by_name(signature, "logits")
        return buffers

    def _make_cache(self, decoder: dict[str, Any]) -> dict[str, Any]:
        signature = self._decode[0][1]
        names = [f"{kind}_{i}" for i in range(decoder["num_layers"]) for kind in ("key", "value")]
        shape = (decoder["num_key_value_heads"], self.context_length, decoder["head_dim"])
        cache = {n: self._model.create_input_buffer_by_name(signature, n) for n in names}
        for buffer in cache.values():
            # A masked position must hold a finite number: zero weight times infinity is NaN.
            buffer.write(np.zeros(shape, np.float32))
        return cache

    def _run(self, signature: str, tokens: Sequence[int], position: int) -> None:
        buffers = self._buffers[signature]
        buffers["tokens"].write(np.asarray(tokens, np.int32))
        buffers["position"].write(np.asarray([position], np.int32))
        inputs = {"tokens": buffers["tokens"], "position": buffers["position"], **self._cache}
        outputs = dict(self._cache)
        if "logits" in buffers:
            outputs["logits"] = buffers["logits"]
        self._model.run_by_name(signature, inputs, outputs)

    def decode(self, token: int, position: int) -> np.ndarray:
        """Reads one token and returns the logits behind it, float32 `(vocabulary,)`."""
        name = next(name for window, name in self._decode if position < window)
        self._run(name, [token], position)
        logits: np.ndarray = self._buffers[name]["logits"].read(self.vocabulary_size, np.float32)
        return logits

    def prefill(self, tokens: Sequence[int]) -> None:
        """Reads tokens from position 0 on, without logits."""
        position = 0
        while position < len(tokens):
            left = len(tokens) - position
            # The smallest length that covers what is left, or the largest there is.
            length, name = next((p for p in self._prefill if p[0] >= left), self._prefill[-1])
            position = self._chunk(name, length, tokens, position)

    def _chunk(self, name: str, length: int, tokens: Sequence[int], position: int) -> int:
        """Runs one signature of fixed length; returns the position behind it.

        Near the end of the context it steps back and reads some tokens again, since a write past
        the end of the cache would be moved.
        """
        start = min(position, self.context_length - length)
        chunk = list(tokens[start : start + length])
        self._run(name, chunk + [0] * (length - len(chunk)), start)
        return start + len(chunk)

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Reads tokens from position 0 on; returns all logits, float32 `(tokens, vocabulary)`."""
        logits = np.empty((len(tokens), self.vocabulary_size), np.float32)
        length, name = self._score[-1]
        position = 0
        while position < len(tokens):
            start = min(position, self.context_length - length)
            position = self._chunk(name, length, tokens, position)
            out = self._buffers[name]["logits"].read(length * self.vocabulary_size, np.float32)
            logits[start:position] = out.reshape(length, -1)[: position - start]
        return logits


def _release(native: dict[str, Any]) -> None:
    """Drops LiteRT's objects, which log their end."""
    with quiet_native_logs():
        native.clear()


def _by_size(signatures: dict[str, int]) -> list[tuple[int, str]]:
    return sorted((size, name) for name, size in signatures.items())
