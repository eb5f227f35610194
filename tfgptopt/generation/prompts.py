"""Prompts as they are given, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgptopt.generation.codec import Codec, Prompt


class Prompts:
    """Encodes prompts of one model.

    Args:
        codec: Encodes texts.
        context_length: Most tokens of a text.
    """

    def __init__(self, codec: Codec, context_length: int) -> None:
        self._codec, self._context_length = codec, context_length

    def check_length(self, ids: list[int], most: int) -> None:
        """Checks that a prompt fits.

        Raises:
            ValueError: If it has more tokens than `most`.
        """
        if len(ids) > most:
            raise ValueError(
                f"The prompt has {len(ids)} tokens, and the model's context has "
                f"{self._context_length}. Shorten the prompt."
            )

    def prepare_all(
        self, prompts: Sequence[Prompt], max_length: int | None, special_tokens: bool
    ) -> list[tuple[list[int], int]]:
        """Returns what `prepare` does, of each prompt.

        Raises:
            ValueError: If one cannot be continued, with its place in the list.
        """
        prepared = []
        for i, prompt in enumerate(prompts):
            try:
                prepared.append(self.prepare(prompt, max_length, special_tokens))
            except ValueError as error:
                if len(prompts) == 1:
                    raise
                raise ValueError(f"Prompt {i} of {len(prompts)}: {error}") from error
        return prepared

    def prepare(
        self, prompt: Prompt, max_length: int | None, special_tokens: bool
    ) -> tuple[list[int], int]:
        """Checks a prompt and returns its ids and the length to stop at.

        Raises:
            ValueError: If it cannot be encoded, or the length is out of range.
        """
        ids, context = (
            self._codec.encode(prompt, special_tokens=special_tokens),
            self._context_length,
        )
        self.check_length(ids, context)
        length = context if max_length is None else max_length
        if not len(ids) <= length <= context:
            raise ValueError(
                f"`max_length` counts the prompt too: it must lie between the prompt's {len(ids)} "
                f"tokens and the context of {context}. Received: {max_length}"
            )
        return ids, length


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Returns whether it is one prompt rather than a list of them."""
    if isinstance(prompts, str | bytes):
        return True
    items = list(prompts)
    return not items or not isinstance(items[0], str | bytes | Sequence | np.ndarray)
