"""Texts that are decoded together: the weights are read once for a token of each.

Their caches lie side by side in one, each in a slot. A text is read into a cache of its own, which
is then put into a slot.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel

from tfgptopt.file.metadata import DecoderShape, Signature
from tfgptopt.file.names import (
    LOGITS,
    PARENTS,
    PLACE,
    POSITIONS,
    ROWS,
    START,
    TEXT,
    TOKENS,
    WINDOW_START,
    in_layer,
    of_all_texts,
    reorder_of,
)
from tfgptopt.generation.caches import Buffers, Cache, Caches, alike


class Batch:
    """The slots of texts that are decoded together; there may be but one. `Engine.new_batch` makes
    it.

    A batch in which a call was interrupted is of no use.

    Args:
        model: The model.
        lock: Held while it runs.
        signature: What decodes the batch.
        caches: Makes the caches of this signature.
        decoder: What the file says of the decoder.

    Attributes:
        size: How many slots there are.
        tokens: The tokens of each slot that its cache holds.
    """

    def __init__(
        self,
        model: CompiledModel,
        lock: threading.Lock,
        signature: Signature,
        caches: Caches,
        decoder: DecoderShape,
    ) -> None:
        self.size, self._name = signature
        self.tokens: list[list[int]] = [[] for _ in range(self.size)]
        self._model, self._lock, self._caches = model, lock, caches
        self._num_layers, self._vocabulary_size = decoder.num_layers, decoder.vocabulary_size
        signatures = model.get_signature_list()
        self._written = [name for name in signatures[self._name]["outputs"] if name != LOGITS]
        self._placed, self._moved_at_once = [], 0
        if self.size > 1:
            self._placed = list(signatures[PLACE]["outputs"])
            details = model.get_input_tensor_details(reorder_of(self.size))
            self._moved_at_once = int(details[ROWS]["shape"][0])
        inputs = signatures[self._name]["inputs"]
        self._given = {
            name: model.create_input_buffer_by_name(self._name, name)
            for name in (TOKENS, POSITIONS, WINDOW_START)
            if name in inputs
        }
        if WINDOW_START in self._given:  # All rows are held here.
            self._given[WINDOW_START].write(np.zeros(1, np.int32))
        self._logits = model.create_output_buffer_by_name(self._name, LOGITS)
        self._cache = caches.new()

    def place(self, slot: int, cache: Cache, expected: int) -> None:
        """Puts a text into a slot. Where there is but one, it goes on in the cache itself.

        Args:
            slot: The slot, whose text is forgotten.
            cache: The cache of the text, which was read as a whole. A batch of one writes into it,
                so that nothing else may be read in it until the text is finished or another batch
                has taken it over.
            expected: Tokens that it will have.
        """
        with self._lock:
            if self.size == 1:
                self._cache, self.tokens = cache, [cache.tokens]
                return
            self._fit(max(cache.positions, len(cache.tokens) + 1), expected)
            begin = self._model.create_input_buffer_by_name(PLACE, START)
            for layer in range(self._num_layers):
                heads = self._caches.fit_place(layer, self._cache, self.size, cache.positions)
                begin.write(np.asarray([slot * heads, 0, 0], np.int32))
                inputs, outputs = {START: begin}, {}
                for key in self._placed:
                    held = self._cache.buffers[in_layer(key, layer)]
                    inputs[key] = outputs[key] = held
                    inputs[f"{TEXT}_{key}"] = cache.buffers[in_layer(key, layer)]
                self._model.run_by_name(PLACE, inputs, outputs)
            self.tokens[slot] = list(cache.tokens)

    def decode(self, tokens: Mapping[int, int], expected: int) -> dict[int, np.ndarray]:
        """Reads one token more in some slots.

        Args:
            tokens: The token of each slot. The others are left as they are.
            expected: Most tokens that one of the texts will have.

        Returns:
            The logits of each of these slots, float32 `(vocabulary,)`.
        """
        given = np.zeros((2, self.size), np.int32)
        for slot, held in enumerate(self.tokens):
            # What is written behind a text that is not read has no meaning, and is written over.
            given[:, slot] = tokens.get(slot, 0), len(held)
        with self._lock:
            ends = [len(self.tokens[slot]) + 1 for slot in tokens]
            self._fit(max(ends), expected)
            given[1] = np.minimum(given[1], self._cache.positions - 1)
            for name, values in zip((TOKENS, POSITIONS), given, strict=True):
                self._given[name].write(values)
            buffers = self._cache.buffers
            outputs = {name: buffers[of_all_texts(name)] for name in self._written}
            outputs[LOGITS] = self._logits
            self._model.run_by_name(self._name, {**self._given, **buffers}, outputs)
            size = self.size * self._vocabulary_size
            logits = self._logits.read(size, np.float32).reshape(self.size, -1)
        for slot, token in tokens.items():
            self.tokens[slot].append(token)
        return {slot: logits[slot] for slot in tokens}

    def reorder(self, parents: Sequence[int]) -> None:
        """Gives each slot the text of another one, or its own, from where they differ.

        Args:
            parents: The slot whose text each is to have.
        """
        texts = [self.tokens[parent] for parent in parents]
        pairs = [(old, new) for old, new in zip(self.tokens, texts, strict=True) if old != new]
        if not pairs:
            return
        begin, end = min(alike(*pair) for pair in pairs), max(len(new) for _, new in pairs)
        name, count = reorder_of(self.size), self._moved_at_once
        with self._lock:
            create = self._model.create_input_buffer_by_name
            given: Buffers = {key: create(name, key) for key in (PARENTS, ROWS)}
            given[PARENTS].write(np.asarray(parents, np.int32))
            self._caches.fit(name, self._cache, end, end)
            # Rows before `begin` are the same in both; no row is moved twice.
            for start in range(begin // count * count, end, count):
                given[ROWS].write(np.arange(start, start + count, dtype=np.int32))
                self._model.run_by_name(name, {**given, **self._cache.buffers}, self._cache.buffers)
        self.tokens = [list(text) for text in texts]

    def take_over(self, other: Batch, slots: Sequence[int]) -> None:
        """Takes the texts of some slots of another batch, which are the first ones then."""
        with self._lock:
            self._cache = other._caches.some(other._cache, slots, other.size, self._caches)
        texts = [list(other.tokens[slot]) for slot in slots]
        self.tokens = texts + [[] for _ in range(self.size - len(texts))]

    def _fit(self, end: int, expected: int) -> None:
        """Makes the caches large enough, and the signature fit them.

        Raises:
            RuntimeError: If what they held was lost.
        """
        if self._cache.positions == 0:
            raise RuntimeError("The batch was interrupted while its caches grew.")
        self._caches.fit(self._name, self._cache, end, expected)
