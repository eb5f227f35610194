"""TFLiteCausalLM: text in, text out, from one exported file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from tfgptopt.generation import samplers
from tfgptopt.generation.container import read_metadata
from tfgptopt.generation.engine import Engine

Prompt = str | Sequence[int]


class TFLiteCausalLM:
    """Generates text with a file that `tfgptopt.export` wrote.

    It needs numpy, tokenizers and ai-edge-litert, and neither TensorFlow nor Keras.

    Args:
        path: The `.tflite` file.
        num_threads: int. Threads for the kernels. Defaults to `None`: all cores.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no TFLite file, was cut off, or was not written by tfgptopt.

    Example:

    ```python
    lm = tfgptopt.TFLiteCausalLM("gpt.tflite")
    print(lm.generate("import os\\n", max_length=64))
    for piece in lm.stream("def main(", sampler="top_k", seed=1):
        print(piece, end="", flush=True)
    ```
    """

    def __init__(self, path: str | Path, num_threads: int | None = None) -> None:
        if num_threads is not None and (not isinstance(num_threads, int) or num_threads < 1):
            raise ValueError(f"`num_threads` must be an int >= 1. Received: {num_threads!r}")
        self.path = Path(path)
        self.metadata: dict[str, Any] = read_metadata(path)
        self._generation = self.metadata["generation"]
        blob = self.metadata["tokenizer"]
        self._tokenizer = tokenizers.Tokenizer.from_str(blob) if blob else None
        self._engine = Engine(
            self.path,
            self.metadata["decoder"],
            self.metadata["signatures"],
            num_threads or os.cpu_count() or 1,
        )

    @property
    def context_length(self) -> int:
        """Most tokens that a text can have, prompt included."""
        return self._engine.context_length

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the model knows."""
        return self._engine.vocabulary_size

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, without a start token.

        Raises:
            ValueError: If the file has no tokenizer, or the text has characters it cannot encode.
        """
        if self._tokenizer is None:
            raise ValueError(
                "The file has no tokenizer: the model was exported without a preprocessor. "
                "Give lists of token ids."
            )
        try:
            ids: list[int] = self._tokenizer.encode(text).ids
            lossless = self._tokenizer.decode(ids, skip_special_tokens=False) == text
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"The prompt is no valid Unicode text: {error}") from None
        if not lossless:
            raise ValueError("The prompt has characters that the tokenizer's vocabulary lacks.")
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        if self._tokenizer is None:
            raise ValueError("The file has no tokenizer: the model was exported without one.")
        text: str = self._tokenizer.decode(list(ids))
        return text

    def _encode(self, prompt: Prompt) -> list[int]:
        """Checks a prompt and returns its ids."""
        if isinstance(prompt, bytes):
            raise ValueError(
                "A prompt is text or a list of token ids. Received bytes: decode them."
            )
        if len(prompt) == 0:
            raise ValueError("The prompt is empty. Give at least one character or token id.")
        if isinstance(prompt, str):
            ids = self.tokenize(prompt)
            start = self._generation["start_token_id"]
            ids = ids if start is None else [start, *ids]
        else:
            ids = [int(token) for token in prompt]
        if min(ids) < 0 or max(ids) >= self.vocabulary_size:
            raise ValueError(
                f"The prompt has token id {max(ids) if min(ids) >= 0 else min(ids)}; ids of this "
                f"model go from 0 to {self.vocabulary_size - 1}."
            )
        return ids

    def _check_length(self, ids: list[int], most: int) -> None:
        if len(ids) > most:
            raise ValueError(
                f"The prompt has {len(ids)} tokens, and the model's context has "
                f"{self.context_length}. Shorten the prompt."
            )

    def _prepare(self, prompt: Prompt, max_length: int | None) -> tuple[list[int], int]:
        """Checks a prompt and returns its ids and the length to stop at."""
        ids = self._encode(prompt)
        self._check_length(ids, self.context_length)
        length = self.context_length if max_length is None else max_length
        if not len(ids) <= length <= self.context_length:
            raise ValueError(
                f"`max_length` counts the prompt too: it must lie between the prompt's {len(ids)} "
                f"tokens and the context of {self.context_length}. Received: {max_length}"
            )
        return ids, length

    def _stop_ids(self, stop: str | Sequence[int] | None) -> set[int]:
        if stop == "auto":
            end = self._generation["end_token_id"]
            return set() if end is None else {end}
        if stop is None:
            return set()
        if isinstance(stop, str):
            raise ValueError(f"`stop` is 'auto', None or token ids. Received: {stop!r}")
        return {int(token) for token in stop}

    def _new_tokens(
        self, ids: list[int], length: int, sampler: samplers.Sampler, stop: set[int], seed: Any
    ) -> Iterator[int]:
        generator = np.random.default_rng(seed)
        self._engine.prefill(ids[:-1])
        token, position = ids[-1], len(ids) - 1
        while position + 1 < length:
            token = sampler(self._engine.decode(token, position), generator)
            if token in stop:
                return
            yield token
            position += 1

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_length: int | None = None,
        sampler: str | samplers.Sampler = "greedy",
        stop: str | Sequence[int] | None = "auto",
        strip_prompt: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Continues prompts.

        Args:
            prompts: A text, a list of token ids, or a list of those.
            max_length: int. Tokens of prompt and continuation together, the start token that a
                text gets included. Defaults to `None`: the whole context.
            sampler: `"greedy"`, `"top_k"`, or a callable such as `TopK(k=5)`. Defaults to
                `"greedy"`.
            stop: `"auto"` for the tokenizer's end token, `None` to go on to `max_length`, or
                token ids. Defaults to `"auto"`.
            strip_prompt: bool. Return only what is new. Defaults to `False`.
            seed: int. Seed of the sampler. Defaults to `None`: another result at each call.

        Returns:
            What was given: a text for a text, ids for ids, a list for a list.

        Raises:
            ValueError: If a prompt is empty, too long or cannot be encoded, or an argument is out
                of range.
        """
        chosen, stop_ids = samplers.get(sampler), self._stop_ids(stop)
        single = _is_single(prompts)
        batch: list[Any] = [prompts] if single else list(prompts)
        prepared = [self._prepare(prompt, max_length) for prompt in batch]
        results: list[Any] = []
        for prompt, (ids, length) in zip(batch, prepared, strict=True):
            new = list(self._new_tokens(ids, length, chosen, stop_ids, seed))
            if isinstance(prompt, str):
                completed = self.detokenize(ids + new)
                shown = len(self.detokenize(ids)) if strip_prompt else 0
                results.append(completed[shown:])
            else:
                results.append(new if strip_prompt else ids + new)
        return results[0] if single else results

    def stream(
        self,
        prompt: str,
        max_length: int | None = None,
        sampler: str | samplers.Sampler = "greedy",
        stop: str | Sequence[int] | None = "auto",
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yields the continuation of a text as it comes, never half a character.

        Args:
            prompt: The text to continue.
            max_length, sampler, stop, seed: As for `generate`.

        Yields:
            Pieces of text, without the prompt.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"`stream` continues a text. Received: {type(prompt).__name__}")
        ids, length = self._prepare(prompt, max_length)
        new = self._new_tokens(ids, length, samplers.get(sampler), self._stop_ids(stop), seed)
        return self._decode_stream(new)

    def _decode_stream(self, new: Iterator[int]) -> Iterator[str]:
        assert self._tokenizer is not None  # The prompt was tokenized with it.
        decoder = DecodeStream(skip_special_tokens=True)
        for token in new:
            piece = decoder.step(self._tokenizer, token)
            if piece:
                yield piece

    def score(self, prompt: Prompt) -> np.ndarray:
        """Returns how likely each token of a text is, given those before it.

        Args:
            prompt: A text or a list of token ids, longer than the context by one token at most
                (the last is not read, only predicted).

        Returns:
            float32 array of natural logarithms of probabilities, one for each token but the first
            (for a text, the first is the start token).
        """
        ids = self._encode(prompt)
        self._check_length(ids, self.context_length + 1)
        logits = self._engine.score(ids[:-1]).astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        chosen = shifted[np.arange(len(ids) - 1), ids[1:]]
        return (chosen - np.log(np.exp(shifted).sum(axis=-1))).astype(np.float32)


def _is_single(prompts: Any) -> bool:
    """Returns whether `prompts` is one prompt rather than a list of them."""
    if isinstance(prompts, str | bytes):
        return True
    items = list(prompts)
    return not items or not isinstance(items[0], str | bytes | Sequence | np.ndarray)
