"""TFLiteCausalLM: text in, text out, from one exported file."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfgptopt.file.container import file_identity, read_container
from tfgptopt.generation import guessing, samplers
from tfgptopt.generation.caches import Cache
from tfgptopt.generation.chat import Chat
from tfgptopt.generation.codec import Codec, Prompt, Stop, StopLike
from tfgptopt.generation.constraints import Constraint, Matcher, Matchers
from tfgptopt.generation.continuing import Continuation
from tfgptopt.generation.decoding import Decoding
from tfgptopt.generation.engine import Engine
from tfgptopt.generation.guessing import Draft, Speculation
from tfgptopt.generation.session import Session
from tfgptopt.generation.speculating import Statistics
from tfgptopt.generation.templates import KNOWN, ChatTemplate, get_template
from tfgptopt.generation.weight_cache import cache_folder


class TFLiteCausalLM:
    """Generates text with a file that `tfgptopt.export` wrote.

    It needs numpy, tokenizers, sentencepiece and ai-edge-litert, and neither TensorFlow nor
    Keras. Threads may share it; they take turns at each token.

    A prompt that begins like the one before it is read from where they differ.

    Args:
        path: The `.tflite` file, or a `.litertlm` bundle, whose model is kept in a file of its
            own in the folder of `weight_cache`, since LiteRT maps only whole files.
        num_threads: int. Threads for the kernels. Defaults to `None`: all cores.
        weight_cache: Folder for the weights as the CPU's kernels want them, so that the file loads
            in an instant the second time; `False` for none. Defaults to `True`: the folder that
            the environment variable `TFGPTOPT_WEIGHT_CACHE` names (`off` for none), else
            `tfgptopt` in the user's cache folder. A folder that cannot be written is no error.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the file is a bundle, and `litert-lm-builder` is not installed.
        ValueError: If the file is no TFLite file, is damaged or was cut off, was not written by
            tfgptopt, has another version of the format, or was replaced while it was being loaded.

    Example:

    ```python
    lm = tfgptopt.TFLiteCausalLM("gpt.tflite")
    print(lm.generate("import os\\n", max_length=64))
    for piece in lm.stream("def main(", sampler="top_k", seed=1):
        print(piece, end="", flush=True)
    ```
    """

    def __init__(
        self,
        path: str | Path,
        num_threads: int | None = None,
        weight_cache: bool | str | Path = True,
    ) -> None:
        if num_threads is not None and (not isinstance(num_threads, int) or num_threads < 1):
            raise ValueError(f"`num_threads` must be an int >= 1. Received: {num_threads!r}")
        self.path = Path(path)
        self._folder = folder = cache_folder(weight_cache)
        container = read_container(path, folder)
        self.metadata = container.metadata
        self._codec = Codec(self.metadata)
        self._num_threads = num_threads or os.cpu_count() or 1
        self._engine = Engine(self.path, container, self._num_threads, folder)
        # By settings, and by which file a draft is: another may take its place.
        self._decodings: dict[object, Decoding] = {}
        self._idle: Cache | None = None
        # Reentrant: a stream that is thrown away gives its cache back whenever Python collects it.
        self._idle_lock = threading.RLock()

    @property
    def context_length(self) -> int:
        """Most tokens that a text can have, prompt included."""
        return self._engine.context_length

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the model knows."""
        return self._engine.vocabulary_size

    def tokenize(self, text: str, special_tokens: bool = False) -> list[int]:
        """Returns the token ids of a text, without a start token.

        Args:
            text: The text.
            special_tokens: bool. Whether names of special tokens in it are those. Defaults to
                `False`: they are text.

        Raises:
            ValueError: If the file has no tokenizer, or the text has characters it cannot encode.
        """
        return self._codec.tokenize(text, special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens.

        Raises:
            ValueError: If the file has no tokenizer.
        """
        return self._codec.detokenize(ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_length: int | None = None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler] = "greedy",
        stop: StopLike = "auto",
        strip_prompt: bool = False,
        seed: int | None = None,
        special_tokens: bool = False,
        speculative: Speculation | str | None = None,
        constraint: Constraint | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Continues prompts.

        Args:
            prompts: A text, a list of token ids, or a list of those. `""` begins with the start
                token, if the model has one.
            max_length: int. Tokens of prompt and continuation together, the start token that a
                text gets included. Defaults to `None`: the whole context.
            sampler: `"greedy"`, `"random"`, `"top_k"`, `"top_p"`, `"min_p"`; or a sampler such as
                `TopK(k=5)`; or several, which are applied one after the other, such as
                `[RepetitionPenalty(1.2), TopK(40), TopP(0.9)]`. Defaults to `"greedy"`.
            stop: `"auto"` for the tokenizer's end token; `None` to go on to `max_length`; a text
                or token id, or a list of those. The end token stops too unless ids are given.
                What stops is not part of the result. Defaults to `"auto"`.
            strip_prompt: bool. Return only what is new. Defaults to `False`.
            seed: int. Seed of the sampler. Defaults to `None`: another result at each call.
            special_tokens: bool. Whether names of special tokens in a text, such as
                `<start_of_turn>`, are those tokens. Defaults to `False`: what a person typed is
                text.
            speculative: `NGram()` or `Draft(path)`: guess the next tokens and read them at once;
                `"auto"` is `NGram()`. The text is that of plain decoding, sampled ones have its
                distribution; only the speed depends on the guesses, and where they do not pay,
                none are made. Defaults to `None`: a call of the model for each token.
            constraint: `JsonSchema(...)`, `Regex(...)` or `Grammar(...)`: what the continuation
                must be. It ends by itself where that is complete; a text that reaches `max_length`
                before is cut off there. Needs the extra `constraints`. Defaults to `None`.
            return_stats: bool. Also return `Statistics`. Defaults to `False`.

        Returns:
            What was given: a text for a text, ids for ids, a list for a list. With `return_stats`,
            a tuple of that and the statistics of all.

        Raises:
            ValueError: If a prompt is empty, too long or cannot be encoded, an argument is out of
                range, or a draft has other tokens.
        """
        chosen, ends = samplers.get(sampler), self._ends(stop, constraint)
        decoding, statistics = self._decoding(speculative), Statistics()
        began = time.perf_counter()
        single = _is_single(prompts)
        batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
        prepared = [self._prepare(prompt, max_length, special_tokens) for prompt in batch]
        results: list[str | list[int]] = []
        for prompt, (ids, length) in zip(batch, prepared, strict=True):
            with self._cache() as cache:
                matcher = self._matcher(constraint, ids)
                new = decoding.tokens(cache, ids, length, chosen, seed, statistics, matcher)
                continuation = Continuation(new, self._codec, ids, ends)
                if isinstance(prompt, str):
                    text = "".join(continuation.pieces())
                    results.append(text if strip_prompt else prompt + text)
                else:
                    tokens = continuation.run()
                    results.append(tokens if strip_prompt else ids + tokens)
        result = results[0] if single else results
        statistics.seconds = time.perf_counter() - began
        return (result, statistics) if return_stats else result

    def stream(
        self,
        prompt: str,
        max_length: int | None = None,
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler] = "greedy",
        stop: StopLike = "auto",
        seed: int | None = None,
        special_tokens: bool = False,
        speculative: Speculation | str | None = None,
        constraint: Constraint | None = None,
    ) -> Iterator[str]:
        """Yields the continuation of a text as it comes.

        Args:
            prompt: The text to continue.
            max_length, sampler, stop, seed, special_tokens, speculative, constraint: As for
                `generate`.

        Yields:
            Pieces of text, without the prompt: whole characters, and nothing of a stop text.

        Raises:
            ValueError: As `generate`, and if `prompt` is no text.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"`stream` continues a text. Received: {type(prompt).__name__}")
        chosen, ends = samplers.get(sampler), self._ends(stop, constraint)
        decoding = self._decoding(speculative)
        ids, length = self._prepare(prompt, max_length, special_tokens)
        matcher = self._matcher(constraint, ids)

        def pieces() -> Iterator[str]:
            with self._cache() as cache:
                new = decoding.tokens(cache, ids, length, chosen, seed, None, matcher)
                yield from Continuation(new, self._codec, ids, ends).pieces()

        return pieces()

    def score(self, prompt: Prompt, special_tokens: bool = False) -> np.ndarray:
        """Returns how likely each token of a text is, given those before it.

        Args:
            prompt: A text or a list of token ids, longer than the context by one token at most
                (the last is not read, only predicted).
            special_tokens: As for `generate`.

        Returns:
            float32 array of natural logarithms of probabilities, one for each token but the first
            (for a text, the first is the start token).

        Raises:
            ValueError: If the prompt is empty, too long or cannot be encoded.
        """
        ids = self._codec.encode(prompt, special_tokens=special_tokens)
        self._check_length(ids, self.context_length + 1)
        with self._cache() as cache:
            logits = self._engine.score(cache, ids[:-1])
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        sums = np.exp(logits, out=logits).sum(axis=-1, dtype=np.float64)
        scores: np.ndarray = (chosen - np.log(sums)).astype(np.float32)
        return scores

    def session(self, speculative: Speculation | str | None = None) -> Session:
        """Returns a text that grows by turns, as in a chat, with a KV cache of its own.

        Args:
            speculative: As for `generate`. Defaults to `None`.
        """
        decoding = self._decoding(speculative)
        return Session(decoding, self._codec, self._engine.new_cache(), [])

    def chat(
        self,
        system: str | None = None,
        template: ChatTemplate | str | None = None,
        speculative: Speculation | str | None = None,
    ) -> Chat:
        """Returns a chat, which takes messages and keeps its KV cache between them.

        Args:
            system: What the model is told first. Defaults to `None`: nothing.
            template: A `ChatTemplate`, the name of a known one (`"gemma"`, `"gemma4"`, `"llama3"`,
                `"chatml"`, `"qwen"`, `"smollm"`, `"phi3"`), or Jinja. Defaults to `None`: the
                file's own.
            speculative: As for `generate`. Defaults to `None`.

        Raises:
            ValueError: If the file has no template and none is given, or no tokenizer.
        """
        chat = self.metadata.chat
        if template is None and chat is None:
            raise ValueError(
                "The file has no chat template: its model had none, or is not one for chats. Give "
                f"`template`: one of {', '.join(KNOWN)}, Jinja, or a `ChatTemplate`."
            )
        own = None if chat is None else ChatTemplate.from_metadata(chat)
        written = get_template(template or own or "")
        return Chat(self.session(speculative), self._codec, written, system)

    def reset(self) -> None:
        """Forgets the last prompt, which is kept for the next one that begins like it."""
        with self._idle_lock:
            self._idle = None

    def _decoding(self, speculative: Speculation | str | None) -> Decoding:
        """Returns how tokens are made; what it learned of this machine is kept."""
        settings = guessing.get(speculative)
        key = settings, file_identity(settings.path) if isinstance(settings, Draft) else None
        if key not in self._decodings:
            self._decodings[key] = Decoding(
                self._engine, self.metadata, settings, self._num_threads, self._folder
            )
        return self._decodings[key]

    @functools.cached_property
    def _matchers(self) -> Matchers:
        return Matchers(self._codec, self.metadata)

    def _matcher(self, constraint: Constraint | None, ids: list[int]) -> Matcher | None:
        """Returns what holds the continuation of a prompt to a constraint."""
        return None if constraint is None else self._matchers.matcher(constraint, ids)

    def _ends(self, stop: StopLike, constraint: Constraint | None) -> Stop:
        """Returns what ends a continuation.

        Raises:
            ValueError: If it could not end where its form is complete.
        """
        ends = self._codec.stop(stop)
        if constraint is not None and not ends.ids & self._codec.end_token_ids:
            raise ValueError(
                "A constraint is complete at the end token, which has to stop the text: leave "
                f"`stop` at 'auto', or give texts. Received: stop={stop!r}"
            )
        return ends

    @contextlib.contextmanager
    def _cache(self) -> Iterator[Cache]:
        """Lends a cache, the one that was used last if it is free."""
        with self._idle_lock:
            cache, self._idle = self._idle, None
        cache = cache or self._engine.new_cache()
        try:
            yield cache
        finally:
            with self._idle_lock:
                self._idle = cache

    def _check_length(self, ids: list[int], most: int) -> None:
        """Checks that a prompt fits.

        Raises:
            ValueError: If it has more tokens than `most`.
        """
        if len(ids) > most:
            raise ValueError(
                f"The prompt has {len(ids)} tokens, and the model's context has "
                f"{self.context_length}. Shorten the prompt."
            )

    def _prepare(
        self, prompt: Prompt, max_length: int | None, special_tokens: bool
    ) -> tuple[list[int], int]:
        """Checks a prompt and returns its ids and the length to stop at.

        Raises:
            ValueError: If it cannot be encoded, or the length is out of range.
        """
        ids = self._codec.encode(prompt, special_tokens=special_tokens)
        self._check_length(ids, self.context_length)
        length = self.context_length if max_length is None else max_length
        if not len(ids) <= length <= self.context_length:
            raise ValueError(
                f"`max_length` counts the prompt too: it must lie between the prompt's {len(ids)} "
                f"tokens and the context of {self.context_length}. Received: {max_length}"
            )
        return ids, length


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Returns whether `prompts` is one prompt rather than a list of them."""
    if isinstance(prompts, str | bytes):
        return True
    items = list(prompts)
    return not items or not isinstance(items[0], str | bytes | Sequence | np.ndarray)
