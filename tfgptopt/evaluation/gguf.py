"""Files of llama.cpp, to compare with: through llama-cpp-python (extra `gguf`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgptopt.evaluation.size import Size, gzip_size


class _Tokenizer:
    """The tokenizer of a GGUF file, in the shape of the runtime's."""

    prefixed = False

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self.size: int = llama.n_vocab()
        self.specials: Mapping[str, int] = {}

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Returns the ids of a text."""
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=special_tokens))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self._llama.detokenize(list(ids)).decode(errors="replace"))

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a special token, or `None`."""
        found = self._llama.tokenize(token.encode(), add_bos=False, special=True)
        return found[0] if len(found) == 1 else None

    def lacks(self, text: str, ids: Sequence[int]) -> bool:
        """Returns whether a text has characters that its ids do not tell of."""
        return False


class GgufArtifact:
    """A `.gguf` file in llama.cpp.

    Args:
        path: The file.
        context_length: Positions of its cache. llama-cpp-python keeps the logits of each, so that
            long ones take gigabytes. Defaults to `1024`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If llama-cpp-python is not installed.
    """

    kind = "llama.cpp"

    def __init__(self, path: Path, context_length: int = 1024) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file '{path}'.")
        try:
            from llama_cpp import Llama
        except ImportError:
            raise ImportError(
                f"Measuring '{path}' needs llama-cpp-python: pip install 'tfgptopt[gguf]'."
            ) from None
        self.path: Path | None = path
        self._file = path
        threads = os.cpu_count() or 1  # As files of ours are run.
        self._llama = Llama(
            str(path),
            n_ctx=context_length,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
        )
        self.tokenizer: Any = _Tokenizer(self._llama)
        starts = self._llama.metadata.get("tokenizer.ggml.add_bos_token") == "true"
        self.start_token_id: int | None = self._llama.token_bos() if starts else None
        self.context_length: int | None = self._llama.n_ctx()

    def logits(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Returns logits of a batch, float32 `(batch, length, vocabulary)`."""
        found = []
        for row in np.asarray(inputs["token_ids"]):
            self._llama.reset()
            self._llama.eval(row.tolist())
            found.append(np.array(self._llama.scores[: len(row)], np.float32))
        return tf.convert_to_tensor(np.stack(found))

    def generation(self, prompt: list[int], new_tokens: int) -> Callable[[], list[int]]:
        """Returns a call that reads the prompt anew."""

        def call() -> list[int]:
            self._llama.reset()
            self._llama.eval(prompt)
            made = [int(np.argmax(self._llama.scores[self._llama.n_tokens - 1]))]
            while len(made) < new_tokens:
                self._llama.eval(made[-1:])
                made.append(int(np.argmax(self._llama.scores[self._llama.n_tokens - 1])))
            return made

        return call

    def steps(self, depth: int) -> Callable[[], object] | None:
        """Returns a call that decodes one token."""
        llama = self._llama
        if depth + 1 >= llama.n_ctx():
            return None
        llama.reset()
        llama.eval([i * 7 % llama.n_vocab() for i in range(depth)])

        def call() -> object:
            if llama.n_tokens + 1 >= llama.n_ctx():
                llama.n_tokens = depth
            llama.eval([llama.n_tokens * 7 % llama.n_vocab()])
            return np.argmax(llama.scores[llama.n_tokens - 1])

        return call

    def size(self) -> Size:
        """Returns the size of the file, which does not tell its zeros."""
        return Size(None, None, self._file.stat().st_size, gzip_size(self._file))
