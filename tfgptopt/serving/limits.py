"""What a server takes at most."""

from __future__ import annotations

from dataclasses import dataclass

from tfgptopt.generation.samplers import check_count


@dataclass(frozen=True)
class Limits:
    """What a server takes at most; what is beyond is refused with a status that says so.

    Args:
        queue: int. Texts that wait for a slot. Defaults to `64`; more get status 429.
        body_bytes: int. Size of a request. Defaults to `1048576`; more gets status 413.
        new_tokens: int. Tokens of an answer for which a request names no number, and the most that
            it can name. Defaults to `None`: the rest of the context.

    Raises:
        ValueError: If one is no positive number.
    """

    queue: int = 64
    body_bytes: int = 1 << 20
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_count("queue", self.queue)
        check_count("body_bytes", self.body_bytes)
        if self.new_tokens is not None:
            check_count("new_tokens", self.new_tokens)
