"""TFLiteCausalLM: text in, text out, from one exported file."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfgptopt.file.container import read_container
from tfgptopt.generation import samplers
from tfgptopt.generation.beams import Beam, BeamSearch, Hypothesis, check_alone, names_beams
from tfgptopt.generation.caches import IdleCache
from tfgptopt.generation.chat import Chat
from tfgptopt.generation.codec import Codec, Prompt, Stop, StopLike
from tfgptopt.generation.constraints import Constraint
from tfgptopt.generation.continuing import Continuation
from tfgptopt.generation.decoding import Decodings
from tfgptopt.generation.engine import Engine
from tfgptopt.generation.feeding import Feeder, continue_together
from tfgptopt.generation.guessing import Speculation
from tfgptopt.generation.prompts import is_single
from tfgptopt.generation.scoring import score_tokens
from tfgptopt.generation.session import Session
from tfgptopt.generation.speculating import Statistics
from tfgptopt.generation.templates import KNOWN, ChatTemplate, get_template
from tfgptopt.generation.texts import TextMaker
from tfgptopt.generation.weight_cache import cache_folder
from tfgptopt.generation.workers import generate_in_processes


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

    Attributes:
        metadata: What the file says of itself.
        texts: Makes texts for `feeder`, as a server needs them.

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
        self._engine = Engine.load(self.path, container, self._num_threads, folder)
        self.texts = TextMaker(self._codec, self.metadata)
        self._decodings = Decodings(self._engine, self.metadata, self._num_threads, folder)
        self._idle = IdleCache(self._engine.new_cache)

    @property
    def context_length(self) -> int:
        """Most tokens that a text can have, prompt included."""
        return self._engine.context_length

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the model knows."""
        return self._engine.vocabulary_size

    @property
    def batch_sizes(self) -> list[int]:
        """How many texts the file can decode together, in rising order; often none."""
        return self._engine.batch_sizes

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
        sampler: str | samplers.Sampler | Sequence[samplers.Sampler] | Beam = "greedy",
        stop: StopLike = "auto",
        strip_prompt: bool = False,
        seed: int | None = None,
        special_tokens: bool = False,
        speculative: Speculation | str | None = None,
        constraint: Constraint | None = None,
        return_stats: bool = False,
        num_workers: int = 1,
    ) -> Any:
        """Continues prompts: of a file with batches, several at once.

        Args:
            prompts: A text, a list of token ids, or a list of those. `""` begins with the start
                token, if the model has one.
            max_length: int. Tokens of prompt and continuation together, the start token that a
                text gets included. Defaults to `None`: the whole context.
            sampler: `"greedy"`, `"random"`, `"top_k"`, `"top_p"`, `"min_p"`; or a sampler such as
                `TopK(k=5)`; or several, which are applied one after the other, such as
                `[RepetitionPenalty(1.2), TopK(40), TopP(0.9)]`; or `"beam"` or `Beam(num_beams=4)`,
                of a file with batches. Defaults to `"greedy"`.
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
            num_workers: int. Processes that share the prompts, and the threads; packed weights are
                held once, unless `weight_cache` is off. Each takes about a second to begin.
                Defaults to `1`: this one.

        Returns:
            What was given: a text for a text, ids for ids, a list for a list. With `return_stats`,
            a tuple of that and the statistics of all.

        Raises:
            ValueError: If a prompt is empty, too long or cannot be encoded, an argument is out of
                range, or a draft has other tokens.
        """
        beam, ends = names_beams(sampler), self.texts.ends(stop, constraint)
        chosen = samplers.get("greedy" if isinstance(sampler, Beam) or beam else sampler)
        if beam is not None:
            check_alone(speculative, constraint, ends)
        decoding, statistics = self._decodings.get(speculative), Statistics()
        samplers.check_count("num_workers", num_workers)
        began = time.perf_counter()
        single = is_single(prompts)
        batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item,arg-type]
        prepared = self.texts.prompts.prepare_all(batch, max_length, special_tokens)
        if num_workers > 1 and len(batch) > 1:
            settings = {
                "max_length": max_length,
                "sampler": sampler,
                "stop": stop,
                "seed": seed,
                "strip_prompt": strip_prompt,
                "special_tokens": special_tokens,
                "speculative": speculative,
                "constraint": constraint,
            }
            threads = max(1, self._num_threads // num_workers)
            create = functools.partial(TFLiteCausalLM, self.path, threads, self._folder or False)
            together = max(self.batch_sizes, default=1)
            results, counts = generate_in_processes(create, num_workers, batch, settings, together)
            counts.seconds = time.perf_counter() - began
            return (results, counts) if return_stats else results
        texts = []
        for prompt, (ids, length) in zip(batch, prepared, strict=True):
            as_text = isinstance(prompt, str)
            texts.append(self.texts.make(ids, length, chosen, ends, seed, constraint, as_text))
        if beam is not None:
            for text in texts:
                with self._idle.lent() as cache:
                    BeamSearch(self._engine, beam, ends.ids).continue_text(text, cache, statistics)
        elif speculative is None and len(texts) > 1 and self._engine.batch_sizes:
            with self._idle.lent() as cache:
                continue_together(self._engine, cache, texts, statistics)
        else:
            for text in texts:
                with self._idle.lent() as cache:
                    text.continue_alone(decoding, cache, statistics)
        results = [
            text.result(given, strip_prompt) for given, text in zip(batch, texts, strict=True)
        ]
        statistics.seconds = time.perf_counter() - began
        result = results[0] if single else results
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
            max_length: As for `generate`, as are all arguments behind it.

        Yields:
            Pieces of text, without the prompt: whole characters, and nothing of a stop text.

        Raises:
            ValueError: As `generate`, and if `prompt` is no text.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"`stream` continues a text. Received: {type(prompt).__name__}")
        chosen, ends = samplers.get(sampler), self.texts.ends(stop, constraint)
        decoding = self._decodings.get(speculative)
        ids, length = self.texts.prompts.prepare(prompt, max_length, special_tokens)
        text = self.texts.make(ids, length, chosen, ends, seed, constraint)

        def pieces() -> Iterator[str]:
            with self._idle.lent() as cache:
                yield from text.pieces(decoding, cache, Statistics())

        return pieces()

    def beam_search(
        self,
        prompt: Prompt,
        max_length: int | None = None,
        beam: Beam | None = None,
        num_return_sequences: int = 1,
        stop: StopLike = "auto",
        special_tokens: bool = False,
    ) -> list[Hypothesis]:
        """Returns the likeliest continuations as a whole, as far as beams find them.

        Args:
            prompt: A text or a list of token ids.
            max_length: As for `generate`, as is `special_tokens`.
            beam: `Beam(...)`. Defaults to `None`: four beams.
            num_return_sequences: int. How many to return, at most one for each beam. Defaults to
                `1`.
            stop: As for `generate`, without texts.

        Returns:
            List of `Hypothesis`, the best first: `tokens`, `score`, and `text` of prompt and
            continuation for a text.

        Raises:
            ValueError: As `generate`, and if the file has no batch of so many, or more are asked
                for than there are beams.
        """
        settings, ends = beam or Beam(), self.texts.ends(stop, None)
        check_alone(None, None, ends)
        samplers.check_count("num_return_sequences", num_return_sequences)
        if num_return_sequences > settings.num_beams:
            raise ValueError(
                f"{settings.num_beams} beams find as many continuations. Received: "
                f"num_return_sequences={num_return_sequences}"
            )
        ids, length = self.texts.prompts.prepare(prompt, max_length, special_tokens)
        search = BeamSearch(self._engine, settings, ends.ids)
        with self._idle.lent() as cache:
            found = search.run(cache, ids, length, Statistics())[:num_return_sequences]
        if not isinstance(prompt, str):
            return found
        return [one.with_text(prompt, Continuation(self._codec, ids, Stop())) for one in found]

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
        self.texts.prompts.check_length(ids, self.context_length + 1)
        with self._idle.lent() as cache:
            parts = self._engine.score_parts(cache, ids[:-1])
            losses = score_tokens(parts, np.asarray(ids[1:], int)).losses
        scores: np.ndarray = -losses.astype(np.float32)
        return scores

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits behind each token.

        Args:
            ids: Token ids, no more than the context holds.

        Returns:
            float32 array `(tokens, vocabulary)`.

        Raises:
            ValueError: If there are none, or too many.
        """
        tokens = self._codec.encode(ids)
        self.texts.prompts.check_length(tokens, self.context_length)
        with self._idle.lent() as cache:
            return self._engine.score(cache, tokens)

    def session(self, speculative: Speculation | str | None = None) -> Session:
        """Returns a text that grows by turns, as in a chat, with a KV cache of its own.

        Args:
            speculative: As for `generate`. Defaults to `None`.
        """
        decoding = self._decodings.get(speculative)
        return Session(decoding, self._codec, self.texts.matchers, self._engine.new_cache(), [])

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

    def feeder(self) -> Feeder:
        """Returns what continues texts of `texts` together, as they come."""
        return Feeder(self._engine, self._engine.new_cache(), serving=True)

    def reset(self) -> None:
        """Forgets the last prompt, which is kept for the next one that begins like it."""
        self._idle.forget()
