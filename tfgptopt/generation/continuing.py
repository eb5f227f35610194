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
    """What a model adds to a prompt.

    Args:
        source: Sampled tokens.
        codec: Turns them into text.
        prompt: Tokens before the first one.
        stop: What ends it. Nothing of it is part of the continuation.

    Attributes:
        tokens: The tokens so far; once it was ended by a stop text, those before that.
        tail: Text that `tokens` do not cover, because a stop text begins within a token.
    """

    def __init__(
        self, source: Iterator[int], codec: Codec, prompt: Sequence[int], stop: Stop
    ) -> None:
        self.tokens: list[int] = []
        self.tail = ""
        self._source = source
        self._codec = codec
        self._prompt = prompt
        self._stop = stop

    def run(self) -> list[int]:
        """Goes on to the end; returns the tokens."""
        if self._stop.texts:
            for _ in self.pieces():
                pass
        else:
            self.tokens += self._until_stop_token()
        return self.tokens

    def pieces(self) -> Iterator[str]:
        """Yields text as it comes; a last character that is not whole is U+FFFD."""
        decoder = TextDecoder(self._codec, self._prompt)
        finder = StopFinder(self._stop.texts)
        shown: list[str] = []
        # Where tokens end with whole characters: numbers of tokens and of characters.
        ends = [(0, 0)]
        for token in self._until_stop_token():
            self.tokens.append(token)
            piece, found = finder.add(decoder.add(token))
            shown.append(piece)
            if found:
                self._cut(ends, "".join(shown))
            elif decoder.whole:
                ends.append((len(self.tokens), sum(map(len, shown)) + len(finder.held)))
            if piece:
                yield piece
            if found:
                return
        last, found = finder.add(decoder.rest())
        if found:
            self._cut(ends, "".join([*shown, last]))
        last += finder.held
        if last:
            yield last

    def _until_stop_token(self) -> Iterator[int]:
        for token in self._source:
            if token in self._stop.ids:
                return
            yield token

    def _cut(self, ends: list[tuple[int, int]], text: str) -> None:
        """Keeps the tokens whose text lies before a stop text, which begins behind `text`."""
        count, size = [end for end in ends if end[1] <= len(text)][-1]
        del self.tokens[count:]
        self.tail = text[size:]
