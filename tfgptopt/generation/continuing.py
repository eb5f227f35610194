"""One continuation: tokens from the model, text from the tokens, and where to stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tfgptopt.generation.codec import Codec, Stop

# The last tokens of a prompt: a tokenizer may show a token differently at the start of a text.
_CONTEXT_TOKENS = 4
_HALF = "\ufffd"


class TextDecoder:
    """Turns tokens into text one by one, whole characters only.

    Args:
        codec: Knows the tokenizer.
        prompt: Tokens before the first one.
    """

    def __init__(self, codec: Codec, prompt: Sequence[int]) -> None:
        self._codec = codec
        self._shown = self._context(list(prompt))
        self._pending: list[int] = []

    @property
    def whole(self) -> bool:
        """Whether all tokens were shown."""
        return not self._pending

    def rest(self) -> str:
        """Returns the text of tokens that make no whole character, with U+FFFD for it."""
        before = self._codec.detokenize(self._shown)
        text = self._codec.detokenize(self._shown + self._pending)
        return text[len(before) :]

    def add(self, token: int) -> str:
        """Takes a token; returns the text that is sure now, which may be empty."""
        self._pending.append(token)
        piece = self.rest()
        if piece.endswith(_HALF):
            return ""
        self._shown = self._context(self._shown + self._pending)
        self._pending = []
        return piece

    def _context(self, tokens: list[int]) -> list[int]:
        """Returns the last tokens; so many that there is text, which one begins without a space."""
        count = _CONTEXT_TOKENS
        while count < len(tokens) and not self._codec.detokenize(tokens[-count:]).strip():
            count *= 2
        return tokens[-count:]


class StopFinder:
    """Finds stop texts in a text that comes in pieces, and never shows a part of one.

    Args:
        stops: The texts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Takes a piece; returns the text that no stop can begin in, and whether one was found."""
        text = self.held + piece
        found = [text.find(stop) for stop in self._stops if stop in text]
        if found:
            self.held = ""
            return text[: min(found)], True
        # The longest end of the text that a stop begins with.
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        size = next((n for n in ends if any(s.startswith(text[-n:]) for s in self._stops)), 0)
        self.held = text[len(text) - size :]
        return text[: len(text) - size], False


class Continuation:
    """What a model adds to a prompt, token by token.

    Args:
        codec: Turns tokens into text.
        prompt: Tokens before the first one.
        stop: What ends it. Nothing of it is part of the continuation.
        as_text: bool. Whether the text is wanted; it is made for stop texts in any case. Defaults
            to `True`.

    Attributes:
        tokens: The tokens so far; once it was ended by a stop text, those before that.
        tail: Text that `tokens` do not cover, because a stop text begins within a token.
        ended: Whether it was stopped.
    """

    def __init__(
        self, codec: Codec, prompt: Sequence[int], stop: Stop, as_text: bool = True
    ) -> None:
        self.tokens: list[int] = []
        self.tail = ""
        self.ended = False
        self._stop = stop
        self._decoder = TextDecoder(codec, prompt) if as_text or stop.texts else None
        self._finder = StopFinder(stop.texts)
        self._shown: list[str] = []
        # Where tokens end with whole characters: numbers of tokens and of characters.
        self._ends = [(0, 0)]

    @property
    def text(self) -> str:
        """The text that was sure so far."""
        return "".join(self._shown)

    def add(self, token: int) -> str:
        """Takes a token; returns the text that is sure now, which may be empty."""
        if token in self._stop.ids:
            self.ended = True
            return self.finish()
        self.tokens.append(token)
        if self._decoder is None:
            return ""
        piece, self.ended = self._finder.add(self._decoder.add(token))
        self._shown.append(piece)
        if self.ended:
            self._cut()
        elif self._decoder.whole:
            characters = sum(map(len, self._shown)) + len(self._finder.held)
            self._ends.append((len(self.tokens), characters))
        return piece

    def finish(self) -> str:
        """Returns what is left, once there are no more tokens: halves of characters as U+FFFD."""
        if self._decoder is None:
            return ""
        piece, found = self._finder.add(self._decoder.rest())
        self._shown.append(piece)
        if found:
            self.ended = True
            self._cut()
        self._shown.append(self._finder.held)
        return piece + self._finder.held

    def pieces(self, source: Iterator[int]) -> Iterator[str]:
        """Yields the text of tokens as they come, until it is stopped or there are no more."""
        for token in source:
            piece = self.add(token)
            if piece:
                yield piece
            if self.ended:
                return
        last = self.finish()
        if last:
            yield last

    def _cut(self) -> None:
        """Keeps the tokens whose text lies before a stop text, which begins behind what is sure."""
        text = self.text
        count, size = [end for end in self._ends if end[1] <= len(text)][-1]
        del self.tokens[count:]
        self.tail = text[size:]
