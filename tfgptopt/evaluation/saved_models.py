"""SavedModels that `tfgptopt.export` wrote, as what can be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfgptopt.evaluation.size import Size, gzip_size
from tfgptopt.generation.tokenizing import TextTokenizer


class SavedModelArtifact:
    """A folder that TensorFlow loads. It has no tokenizer of its own.

    Args:
        path: The folder.

    Raises:
        ValueError: If it does not have the signature `serve` of token ids.
    """

    kind = "SavedModel"
    start_token_id: int | None = None
    context_length: int | None = None
    tokenizer: TextTokenizer | None = None

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self._folder = path
        self._saved = tf.saved_model.load(str(path))
        if not hasattr(self._saved, "serve"):
            raise ValueError(
                f"The SavedModel '{path}' has no `serve`. Expected a folder that "
                "`tfgptopt.export(model, folder)` wrote."
            )

    def logits(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Returns logits of a batch, float32 `(batch, length, vocabulary)`."""
        mask = inputs.get("padding_mask")
        ids = tf.cast(inputs["token_ids"], tf.int32)
        mask = tf.ones_like(ids) if mask is None else tf.cast(mask, tf.int32)
        found = self._saved.serve({"token_ids": ids, "padding_mask": mask})
        found = next(iter(found.values())) if isinstance(found, dict) else found
        return tf.cast(found, tf.float32)

    def generation(self, prompt: list[int], new_tokens: int) -> Callable[[], list[int]]:
        """Returns a call of the endpoint `generate`."""
        length = len(prompt) + new_tokens
        token_ids = np.zeros((1, length), np.int32)
        token_ids[0, : len(prompt)] = prompt
        mask = (np.arange(length)[np.newaxis] < len(prompt)).astype(np.int32)

        def call() -> list[int]:
            made = np.asarray(self._saved.generate(token_ids, mask)["token_ids"])
            return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

        return call

    def steps(self, depth: int) -> None:
        """Returns `None`: all tokens come from one call."""

    def size(self) -> Size:
        """Returns the size of all files of the folder; it does not tell its weights apart."""
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        sizes = sum(path.stat().st_size for path in files)
        return Size(None, None, sizes, sum(gzip_size(path) for path in files))
