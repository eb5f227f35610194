"""What can be measured: models, and files and folders of every kind, behind one face."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import keras_hub
import numpy as np
import tensorflow as tf

from tfgptopt.data.encoding import special_id, tokenizer_of
from tfgptopt.data.portable import text_tokenizer
from tfgptopt.data.presets import load_preset
from tfgptopt.evaluation.size import Size, keras_size, tflite_size
from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.generation.tokenizing import TextTokenizer

_GREEDY = keras_hub.samplers.GreedySampler()
FILE_SUFFIXES = (".tflite", ".litertlm")
_KINDS = (
    "a keras_hub.models.CausalLM, a .tflite, .litertlm or .gguf file, a SavedModel that "
    "`tfgptopt.export` wrote, or a preset"
)


@runtime_checkable
class Artifact(Protocol):
    """A causal language model that can be measured, whatever it is made of.

    Attributes:
        kind: What it is, in a word.
        path: Where it lies, or `None` for a model in memory.
        tokenizer: Makes ids of text, or `None`.
        start_token_id: What a text begins with, or `None`.
        context_length: Most tokens of a text, or `None`.
    """

    kind: str
    path: Path | None
    tokenizer: TextTokenizer | None
    start_token_id: int | None
    context_length: int | None

    def logits(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Returns logits of a batch, float32 `(batch, length, vocabulary)`."""

    def generation(self, prompt: list[int], new_tokens: int) -> Callable[[], list[int]]:
        """Returns a call that continues a prompt greedily, and gives what is new."""

    def steps(self, depth: int) -> Callable[[], object] | None:
        """Returns a call that makes one more token behind `depth` others; `None` where the
        artifact makes all tokens in one call, or its context is shorter."""

    def size(self) -> Size:
        """Returns how large it is."""


@runtime_checkable
class InParts(Protocol):
    """An artifact whose logits need not be held all at once."""

    def parts(self, ids: list[int], first: int = 0) -> Iterator[np.ndarray]:
        """Yields logits behind the tokens of a text from `first` on, some at a time."""


@runtime_checkable
class InBatches(Protocol):
    """An artifact that makes tokens of several texts together.

    Attributes:
        batch_sizes: Of how many, in rising order; none if it was not exported with any.
    """

    batch_sizes: list[int]

    def steps_together(self, depth: int, size: int) -> Callable[[], object] | None:
        """Returns a call that makes one more token of each text, all behind `depth` others; `None`
        where the context is shorter."""


class KerasArtifact:
    """A causal LM of KerasHub, dressed or not.

    Args:
        model: The model.
        path: The preset that it was loaded from. Defaults to `None`.
    """

    kind = "Keras"

    def __init__(self, model: keras_hub.models.CausalLM, path: Path | None = None) -> None:
        self.model, self.path = model, path
        known = tokenizer_of(model)
        starts = getattr(model.preprocessor, "add_start_token", False)
        self.start_token_id = special_id(known, "start") if known and starts else None
        self.tokenizer = None if known is None else text_tokenizer(known)
        self.context_length = getattr(model.backbone, "max_sequence_length", None)
        self._call = tf.function(self._floats, reduce_retracing=True, autograph=False)

    def _floats(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        return tf.cast(self.model(inputs, training=False), tf.float32)

    def logits(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Returns logits of a batch, float32 `(batch, length, vocabulary)`."""
        return self._call(inputs)

    def generation(self, prompt: list[int], new_tokens: int) -> Callable[[], list[int]]:
        """Returns a call of KerasHub's compiled `generate_step`."""
        inputs, model, greedy = _padded(prompt, new_tokens), self.model, self._greedy

        def call() -> list[int]:
            before, model.sampler = getattr(model, "sampler", None), _GREEDY
            try:  # It is traced at the first call of a shape, with the sampler that is there then.
                found = np.asarray(greedy(inputs, stop_token_ids=None)["token_ids"])
            finally:
                model.sampler = before
            return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

        return call

    @functools.cached_property
    def _greedy(self) -> Callable[..., dict[str, tf.Tensor]]:
        """What the model compiles, apart from the function that it keeps for its own sampler."""
        kept, self.model.generate_function = self.model.generate_function, None
        try:
            return self.model.make_generate_function()  # type: ignore[no-any-return]
        finally:
            self.model.generate_function = kept

    def steps(self, depth: int) -> None:
        """Returns `None`: all tokens come from one call."""

    def size(self) -> Size:
        """Returns the size of the weights as `.weights.h5`."""
        return keras_size(self.model)


class FileArtifact:
    """A file that `tfgptopt.export` wrote, scored through its own signatures.

    Args:
        lm: The file.
    """

    kind = "file"

    def __init__(self, lm: TFLiteCausalLM) -> None:
        self.lm = lm
        self.path: Path | None = lm.path
        about = lm.metadata
        has_tokenizer = about.tokenizer is not None or about.sentencepiece is not None
        self.tokenizer = lm._codec.tokenizer if has_tokenizer else None
        self.start_token_id = about.generation.start_token_id
        self.context_length: int | None = lm.context_length
        self.batch_sizes = lm.batch_sizes

    def logits(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Returns logits of a batch, float32 `(batch, length, vocabulary)`."""
        rows = np.asarray(inputs["token_ids"])
        return tf.convert_to_tensor(np.stack([self.lm.logits(row.tolist()) for row in rows]))

    def parts(self, ids: list[int], first: int = 0) -> Iterator[np.ndarray]:
        """Yields logits behind the tokens of a text from `first` on, some at a time; those before
        it are read without the head, and those that the last text had too are not read again."""
        lm = self.lm
        tokens = lm._codec.encode(ids)
        lm.texts.prompts.check_length(tokens, lm.context_length)
        with lm._idle.lent() as cache:
            yield from lm._engine.score_parts(cache, tokens, first)

    def generation(self, prompt: list[int], new_tokens: int) -> Callable[[], list[int]]:
        """Returns a call that reads the prompt anew."""

        def call() -> list[int]:
            self.lm.reset()  # Else the prompt would not be read again.
            made = self.lm.generate(prompt, max_length=len(prompt) + new_tokens, stop=None)
            return list(made[len(prompt) :])

        return call

    def steps(self, depth: int) -> Callable[[], object] | None:
        """Returns a call that decodes one token."""
        lm, engine = self.lm, self.lm._engine
        if depth + 1 >= lm.context_length:
            return None
        cache = engine.new_cache()
        engine.read(cache, [i * 7 % lm.vocabulary_size for i in range(depth)])

        def call() -> object:
            if len(cache.tokens) + 1 >= lm.context_length:
                del cache.tokens[depth:]
            return engine.decode(cache, len(cache.tokens) * 7 % lm.vocabulary_size).argmax()

        return call

    def steps_together(self, depth: int, size: int) -> Callable[[], object] | None:
        """Returns a call that decodes one token of each of several texts."""
        lm, engine = self.lm, self.lm._engine
        if depth + 1 >= lm.context_length:
            return None
        batch, cache = engine.new_batch(size), engine.new_cache()
        engine.read(cache, [i * 7 % lm.vocabulary_size for i in range(depth)])
        for slot in range(size):
            batch.place(slot, cache, depth + 1)

        def call() -> object:
            if len(batch.tokens[0]) + 1 >= lm.context_length:
                for text in batch.tokens:
                    del text[depth:]
            end = len(batch.tokens[0])
            logits = batch.decode({i: (end + i) * 7 % lm.vocabulary_size for i in range(size)}, end)
            return [row.argmax() for row in logits.values()]

        return call

    def size(self) -> Size:
        """Returns the size of the file."""
        return tflite_size(self.lm.path)


def open_artifact(source: Any, tokenizer: keras_hub.tokenizers.Tokenizer | None = None) -> Artifact:
    """Returns a model, a file or a folder as what can be measured.

    Args:
        source: A `keras_hub.models.CausalLM`, a `TFLiteCausalLM`, an `Artifact`, or the path of a
            `.tflite`, `.litertlm` or `.gguf` file, of a SavedModel, or the folder or name of a
            preset.
        tokenizer: Tokenizer of KerasHub for artifacts without one, such as SavedModels. Defaults
            to `None`.

    Returns:
        An `Artifact`.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ImportError: If what reads it is not installed.
        ValueError: If it is none of them, or cannot be read.

    Example:

    ```python
    from tfgptopt.evaluation.artifacts import open_artifact

    artifact = open_artifact("gpt.tflite")
    print(artifact.kind, artifact.size().file_bytes)
    ```
    """
    found = _opened(source)
    if tokenizer is not None and found.tokenizer is None:
        found.tokenizer = text_tokenizer(tokenizer)
    return found


def _opened(source: Any) -> Artifact:
    if isinstance(source, keras_hub.models.CausalLM):
        return KerasArtifact(source)
    if isinstance(source, TFLiteCausalLM):
        return FileArtifact(source)
    if not isinstance(source, str | Path):
        if isinstance(source, Artifact):
            return source
        raise ValueError(f"Expected {_KINDS}. Received: {source!r} (of type {type(source)})")
    path = Path(source)
    if path.suffix in FILE_SUFFIXES:
        return FileArtifact(TFLiteCausalLM(path))
    if path.suffix == ".gguf":
        from tfgptopt.evaluation.gguf import GgufArtifact

        return GgufArtifact(path)
    if (path / "saved_model.pb").is_file():
        from tfgptopt.evaluation.saved_models import SavedModelArtifact

        return SavedModelArtifact(path)
    if path.is_file():
        raise ValueError(f"'{path}' cannot be measured. Expected {_KINDS}.")
    return KerasArtifact(load_preset(source), path if path.is_dir() else None)


def _padded(prompt: Sequence[int], new_tokens: int) -> dict[str, np.ndarray]:
    """Returns a prompt with room for new tokens, as KerasHub's `generate_step` takes it."""
    length = len(prompt) + new_tokens
    token_ids = np.zeros((1, length), np.int32)
    token_ids[0, : len(prompt)] = prompt
    return {"token_ids": token_ids, "padding_mask": np.arange(length)[np.newaxis] < len(prompt)}
