"""What a client asks for, read from its JSON and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfgptopt.generation import constraints, samplers
from tfgptopt.generation.codec import Prompt

# What would change an answer, and is not there: refused where it is asked for.
_UNKNOWN = (
    "frequency_penalty", "presence_penalty", "logit_bias", "tools", "functions", "suffix",
    "best_of", "echo", "audio",
)  # fmt: skip
_MOST_CHOICES, _MOST_STOPS, _MOST_SCORES = 16, 4, 20


class BadRequest(ValueError):
    """A request that cannot be served.

    Args:
        message: What is wrong with it.
        status: HTTP status. Defaults to `400`.
        param: The field. Defaults to `None`.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Asked:
    """What is asked for.

    Attributes:
        prompts: Texts or token ids to continue; empty for a chat.
        messages: The chat; empty for prompts.
        max_tokens: Most new tokens, or `None`.
        chain: How a token is chosen.
        stop: Texts that end an answer.
        seed: Of the samplers, or `None`.
        choices: How many answers to each prompt.
        stream: Whether pieces are sent as they come.
        include_usage: Whether a stream ends with the numbers of tokens.
        top_scores: How many likely tokens are wanted with each, or `None` for no scores.
        constraint: What an answer must be, or `None`.
    """

    prompts: tuple[Prompt, ...]
    messages: tuple[Mapping[str, str], ...]
    max_tokens: int | None
    chain: tuple[samplers.Sampler, ...]
    stop: tuple[str, ...]
    seed: int | None
    choices: int
    stream: bool
    include_usage: bool
    top_scores: int | None
    constraint: constraints.Constraint | None


def read_request(body: Any, chat: bool, largest: int | None) -> Asked:
    """Returns what a client asks for.

    Args:
        body: The JSON.
        chat: Whether it is a chat.
        largest: Most new tokens that may be asked for, and what is made where nothing is; `None`
            for no such limit.

    Raises:
        BadRequest: If a field cannot be, or asks for what is not there.
    """
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    for name in _UNKNOWN:
        if body.get(name):
            raise BadRequest(f"`{name}` is not supported: leave it out.", param=name)
    wanted = _integer(body, "max_completion_tokens", 1) or _integer(body, "max_tokens", 1)
    if largest is not None and wanted is not None and wanted > largest:
        raise BadRequest(f"This server makes at most {largest} tokens. Received: {wanted}")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest("`stream_options` must be an object.", param="stream_options")
    return Asked(
        prompts=() if chat else _prompts(body.get("prompt")),
        messages=_messages(body.get("messages")) if chat else (),
        max_tokens=wanted or largest or (None if chat else 16),
        chain=_chain(body),
        stop=_stops(body.get("stop")),
        seed=_integer(body, "seed", 0),
        choices=_integer(body, "n", 1, _MOST_CHOICES) or 1,
        stream=_boolean(body, "stream"),
        include_usage=_boolean(options, "include_usage"),
        top_scores=_scores(body, chat),
        constraint=_constraint(body.get("response_format")),
    )


def _integer(body: Mapping[str, Any], name: str, least: int, most: int = 1 << 31) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limits = f"from {least} to {most}" if most < 1 << 31 else f">= {least}"
        raise BadRequest(f"`{name}` must be an int {limits}. Received: {value!r}", param=name)
    return value


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"`{name}` must be true or false. Received: {value!r}", param=name)
    return bool(value)


def _number(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise BadRequest(f"`{name}` must be a number. Received: {value!r}", param=name)
    return value


def _prompts(given: Any) -> tuple[Prompt, ...]:
    """Returns the prompts: a text, token ids, or a list of those."""
    ids = isinstance(given, list) and bool(given) and all(isinstance(x, int) for x in given)
    found = [given] if isinstance(given, str) or ids else given
    if not isinstance(found, list) or not found or len(found) > _MOST_CHOICES:
        raise BadRequest(
            f"`prompt` must be a text, a list of token ids, or a list of 1 to {_MOST_CHOICES} of "
            "those.",
            param="prompt",
        )
    for one in found:
        if not isinstance(one, str) and not (
            isinstance(one, list) and one and all(type(token) is int for token in one)
        ):
            raise BadRequest(
                f"A prompt is a text or a list of token ids. Received: {one!r:.80}", param="prompt"
            )
    return tuple(found)


def _messages(given: Any) -> tuple[Mapping[str, str], ...]:
    """Returns the messages of a chat, content in parts as one text."""
    if not isinstance(given, list) or not given:
        raise BadRequest("`messages` must be a list of messages.", param="messages")
    found = []
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest("A message is an object with `role` and `content`.", param="messages")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise BadRequest("Only parts of type 'text' are supported.", param="messages")
            content = "".join(str(part) for part in parts)
        if not isinstance(content, str):
            raise BadRequest("The content of a message must be text.", param="messages")
        found.append({"role": message["role"], "content": content})
    return tuple(found)


def _chain(body: Mapping[str, Any]) -> tuple[samplers.Sampler, ...]:
    """Returns how a token is chosen; temperature 0 is greedy."""
    temperature, top_p = _number(body, "temperature"), _number(body, "top_p")
    min_p, penalty = _number(body, "min_p"), _number(body, "repetition_penalty")
    top_k = _integer(body, "top_k", 1)
    try:
        chain: list[samplers.Sampler] = []
        if penalty is not None:
            chain.append(samplers.RepetitionPenalty(penalty))
        if temperature == 0:
            return (*chain, samplers.Greedy())
        chain.append(samplers.Random(1.0 if temperature is None else temperature))
        if top_k is not None:
            chain.append(samplers.TopK(top_k))
        if min_p is not None:
            chain.append(samplers.MinP(min_p))
        if top_p is not None and top_p != 1:
            chain.append(samplers.TopP(top_p))
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return tuple(chain)


def _stops(given: Any) -> tuple[str, ...]:
    found = [given] if isinstance(given, str) else given or []
    fits = isinstance(found, list) and len(found) <= _MOST_STOPS
    if not fits or not all(isinstance(one, str) and one for one in found):
        raise BadRequest(f"`stop` must be a text, or at most {_MOST_STOPS}.", param="stop")
    return tuple(found)


def _scores(body: Mapping[str, Any], chat: bool) -> int | None:
    """Returns how many likely tokens are wanted with each, or `None`."""
    if not chat:
        return _integer(body, "logprobs", 0, _MOST_SCORES)
    count = _integer(body, "top_logprobs", 0, _MOST_SCORES)
    return (count or 0) if _boolean(body, "logprobs") else None


def _constraint(given: Any) -> constraints.Constraint | None:
    """Returns what an answer must be."""
    kind = given.get("type") if isinstance(given, dict) else given
    if kind in (None, "text"):
        return None
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        inner = given.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
    elif kind != "json_object":
        raise BadRequest(
            "`response_format` must have type 'text', 'json_object' or 'json_schema'.",
            param="response_format",
        )
    try:
        return constraints.JsonSchema(schema)
    except (ValueError, ImportError) as error:
        raise BadRequest(str(error), param="response_format") from None


def as_stop(stops: Sequence[str]) -> Any:
    """Returns stop texts as the runtime takes them: the model's own ends stop as well."""
    return list(stops) if stops else "auto"
