"""Texts of a given form: JSON of a schema, a regular expression, a grammar.

llguidance tells what a text may go on with. Its mask over tokens is a sampler like others, with a
memory for one text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tfgptopt.file.metadata import Metadata
from tfgptopt.generation.codec import Codec, Stop, StopLike
from tfgptopt.generation.tokenizing import SentencePiece


class Constraint(Protocol):
    """What a continuation must be."""

    def grammar(self) -> str:
        """Returns llguidance's own grammar for it."""


@dataclass(frozen=True)
class JsonSchema:
    """The continuation is JSON that a schema describes.

    Args:
        schema: A JSON schema, as a dictionary or as text.
        compact: bool. Leave out white space, which takes tokens. Defaults to `False`: the model
            puts it where JSON allows it.

    Raises:
        ImportError: If llguidance is not installed.
        ValueError: If it is no schema, or has what llguidance cannot hold to.

    Example:

    ```python
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    lm.generate("Ann is 30. ", constraint=JsonSchema(schema))
    ```

    Reference: https://json-schema.org
    """

    schema: Mapping[str, Any] | str = field(hash=False)
    compact: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.schema, str | Mapping):
            raise ValueError(f"`schema` must be a dictionary or text. Received: {self.schema!r}")
        _check(self)

    def grammar(self) -> str:
        """Returns llguidance's own grammar for it."""
        text = self.schema if isinstance(self.schema, str) else json.dumps(dict(self.schema))
        options = {"whitespace_flexible": not self.compact}
        return str(_llguidance().LLMatcher.grammar_from_json_schema(text, overrides=options))


@dataclass(frozen=True)
class Regex:
    """The continuation is all that a regular expression describes, from its beginning to its end.

    Args:
        pattern: str, in the syntax of Rust's `regex`: no backreferences, no look-around.

    Raises:
        ImportError: If llguidance is not installed.
        ValueError: If it is no regular expression.

    Example:

    ```python
    lm.generate("The year is ", constraint=Regex(r"(19|20)[0-9]{2}"))
    ```
    """

    pattern: str

    def __post_init__(self) -> None:
        _check(self)

    def grammar(self) -> str:
        """Returns llguidance's own grammar for it."""
        return str(_llguidance().LLMatcher.grammar_from_regex(self.pattern))


@dataclass(frozen=True)
class Grammar:
    """The continuation is a sentence of a context-free grammar.

    Args:
        lark: str. The grammar as Lark writes it, with the rule `start`.

    Raises:
        ImportError: If llguidance is not installed.
        ValueError: If it is no grammar.

    Example:

    ```python
    sums = Grammar('start: NUMBER ("+" NUMBER)*\\nNUMBER: /[0-9]{1,3}/')
    lm.generate("6 = ", constraint=sums)
    ```

    Reference: https://github.com/guidance-ai/llguidance
    """

    lark: str

    def __post_init__(self) -> None:
        _check(self)

    def grammar(self) -> str:
        """Returns llguidance's own grammar for it."""
        return str(_llguidance().LLMatcher.grammar_from_lark(self.lark))


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "Constraints need llguidance: pip install 'tfgptopt[constraints]'."
        ) from None
    return llguidance


def _check(constraint: Constraint) -> None:
    """Raises unless a constraint can be held to.

    Raises:
        ValueError: If it cannot.
    """
    failed, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(constraint.grammar())
    if failed:
        reason = " ".join(messages[0].split())
        raise ValueError(f"{type(constraint).__name__} cannot be held to: {reason}")


class _Pieces:
    """A SentencePiece model as llguidance wants it: the bytes of each token."""

    def __init__(self, tokenizer: SentencePiece, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens, self.special_token_ids = tokenizer.bytes_of_tokens()
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special_tokens=False)


def check_ends(ends: Stop, codec: Codec, stop: StopLike) -> None:
    """Checks that a continuation can end where its form is complete.

    Raises:
        ValueError: If it cannot.
    """
    if not ends.ids & codec.end_token_ids:
        raise ValueError(
            "A constraint is complete at the end token, which has to stop the text: leave "
            f"`stop` at 'auto', or give texts. Received: stop={stop!r}"
        )


class Matchers:
    """Makes what holds the texts of one model to constraints.

    Args:
        codec: Knows the tokenizer.
        metadata: Of the file.
    """

    def __init__(self, codec: Codec, metadata: Metadata) -> None:
        self._codec, self._metadata = codec, metadata

    @functools.cached_property
    def _tokenizer(self) -> Any:
        ends = list(self._metadata.generation.end_token_ids)
        if not ends:
            raise ValueError(
                "A constraint ends with the end token, and the model's tokenizer has none."
            )
        library, found = _llguidance(), self._codec.tokenizer
        wrapped: Any = self._metadata.tokenizer
        if isinstance(found, SentencePiece):
            wrapped = library.TokenizerWrapper(_Pieces(found, ends[0]))
        size = self._metadata.decoder.vocabulary_size
        return library.LLTokenizer(wrapped, n_vocab=size, eos_token=ends)

    def matcher(self, constraint: Constraint, prompt: Sequence[int]) -> Matcher:
        """Returns a sampler for the continuation of one prompt.

        Raises:
            ValueError: If the file has no tokenizer or no end token.
        """
        matcher = _llguidance().LLMatcher(self._tokenizer, constraint.grammar())
        return Matcher(matcher, len(prompt))


class Matcher:
    """Leaves the tokens that a text of the form can go on with. A sampler, for one text.

    Args:
        matcher: llguidance's own, at the beginning.
        start: Tokens of the prompt.
    """

    def __init__(self, matcher: Any, start: int) -> None:
        self._matcher, self._seen = matcher, start

    def __call__(self, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        new = list(tokens[self._seen :])
        if new and not self._matcher.consume_tokens(new):
            raise ValueError(f"The text left its form: {self._matcher.get_error()}")
        self._seen = len(tokens)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, count=len(logits), bitorder="little").astype(bool)
        return np.where(allowed, logits, -np.inf)
