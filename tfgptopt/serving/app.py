"""The routes: OpenAI's completions and chats, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.generation.texts import Text
from tfgptopt.monitoring.generation import GenerationMetrics
from tfgptopt.serving.answers import Chats, Completions, Writer
from tfgptopt.serving.limits import Limits
from tfgptopt.serving.requests import Asked, BadRequest, as_stop, read_request
from tfgptopt.serving.scheduling import Answer, Full, Piece, Scheduler

# Seconds between two looks at whether a client that reads no stream is still there.
_LOOK = 0.25
# How many times too large a body may be that is read to its end, and thrown away.
_DRAINED = 64
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def create_app(
    model: TFLiteCausalLM,
    name: str | None = None,
    limits: Limits = Limits(),
    api_key: str | None = None,
) -> Starlette:
    """Returns a server as an ASGI application, which uvicorn and others run.

    Routes: `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`.

    Args:
        model: The model.
        name: What clients call it. Defaults to `None`: the name of its file without the suffix.
        limits: What it takes at most. Defaults to those of `Limits`.
        api_key: What clients must send as `Authorization: Bearer ...`, but for `/health` and
            `/metrics`. Defaults to `None`: nothing.

    Raises:
        ValueError: If the file has no tokenizer.

    Example:

    ```python
    import uvicorn
    from tfgptopt.serving import create_app

    app = create_app(tfgptopt.TFLiteCausalLM("gpt.tflite"))
    config = uvicorn.Config(app, port=8000)  # uvicorn.Server(config).run()
    ```

    Reference: https://platform.openai.com/docs/api-reference/chat
    """
    model.tokenize("")  # Raises.
    server = _Server(model, name or model.path.stem, limits, api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(server.scheduler.close)

    routes = [
        Route("/v1/completions", server.counted("completions", server.complete), methods=["POST"]),
        Route("/v1/chat/completions", server.counted("chat", server.chat), methods=["POST"]),
        Route("/v1/models", server.counted("models", server.models)),
        Route("/health", server.health),
        Route("/metrics", server.exposition),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


_Handler = Callable[[Request], Awaitable[Response]]


class _Server:
    """What the routes share."""

    def __init__(
        self, model: TFLiteCausalLM, name: str, limits: Limits, api_key: str | None
    ) -> None:
        self._model, self._name, self._limits, self._key = model, name, limits, api_key
        self._metrics = GenerationMetrics()

    def start(self) -> None:
        self.scheduler = Scheduler(self._model, self._limits.queue, self._metrics)

    def counted(self, route: str, handler: _Handler) -> _Handler:
        """Returns a route that checks the key, counts, and gives errors as OpenAI does."""

        async def run(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handler(request)
            except BadRequest as error:
                response = _error(str(error), error.status, error.param)
            self._metrics.requests.labels(route, str(response.status_code)).inc()
            return response

        return run

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, Completions(self._name, self._model))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chats(self._name, self._model))

    async def models(self, request: Request) -> Response:
        model = {"id": self._name, "object": "model", "owned_by": "tfgptopt", "created": 0}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def exposition(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, writer: Writer) -> Response:
        body = await self._body(request)
        asked = read_request(body, writer.is_chat, self._limits.new_tokens)
        if body.get("model") not in (None, self._name):
            raise BadRequest(
                f"This server has the model '{self._name}'. Received: {body['model']!r}",
                404,
                "model",
            )
        texts = await anyio.to_thread.run_sync(self._texts, asked)
        try:
            answers = self.scheduler.submit(texts)
        except Full:
            raise BadRequest(
                f"{self._limits.queue} texts wait already. Try again later.", 429
            ) from None
        if asked.stream:
            return StreamingResponse(
                self._streamed(answers, asked, writer), media_type="text/event-stream"
            )
        return await self._whole(request, answers, asked, writer)

    async def _body(self, request: Request) -> dict[str, object]:
        """Returns the JSON of a request, reading no more than is allowed.

        Raises:
            BadRequest: If it is too large, or none.
        """
        data, most, size = bytearray(), self._limits.body_bytes, 0
        async for part in request.stream():
            size += len(part)
            if size <= most:
                data += part
            elif size > _DRAINED * most:
                break
        if size > most:  # A client that is still sending would not see the answer.
            raise BadRequest(f"The body has more than {most} bytes.", 413)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"The body is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise BadRequest("The body must be a JSON object.")
        return found

    def _texts(self, asked: Asked) -> list[Text]:
        """Returns the texts that are asked for.

        Raises:
            BadRequest: If a prompt or a setting cannot be.
        """
        maker, stop, found = self._model.texts, as_stop(asked.stop), []
        try:
            for prompt in asked.prompts or (None,):
                for choice in range(asked.choices):
                    seed = None if asked.seed is None else asked.seed + choice
                    rest = (asked.max_tokens, asked.chain, stop, seed, asked.constraint)
                    if prompt is None:
                        text = maker.from_messages(asked.messages, *rest)
                    else:
                        text = maker.from_prompt(prompt, *rest)
                    text.top_scores = asked.top_scores
                    found.append(text)
        except (ValueError, ImportError) as error:
            raise BadRequest(str(error)) from None
        return found

    async def _streamed(
        self, answers: list[Answer], asked: Asked, writer: Writer
    ) -> AsyncIterator[str]:
        """Yields server-sent events; a client that goes ends the answers."""
        try:
            for event in writer.first(answers):
                yield _event(event)
            async for number, piece in _merged(answers):
                if piece.error is not None:
                    yield _event({"error": {"message": piece.error, "type": "server_error"}})
                    return
                yield _event(writer.chunk(number, answers[number], piece))
            if asked.include_usage:
                yield _event(writer.usage_chunk(answers))
            yield "data: [DONE]\n\n"
        finally:
            self.scheduler.give_up(answers)

    async def _whole(
        self, request: Request, answers: list[Answer], asked: Asked, writer: Writer
    ) -> Response:
        """Returns whole answers, or nothing if the client goes."""
        collected: list[list[Piece]] = [[] for _ in answers]

        async def collect() -> None:
            async for number, piece in _merged(answers):
                collected[number].append(piece)

        task = asyncio.create_task(collect())
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_LOOK)
                if not task.done() and await request.is_disconnected():
                    return Response(status_code=499)
            await task
        finally:
            task.cancel()
            self.scheduler.give_up(answers)
        errors = [piece.error for pieces in collected for piece in pieces if piece.error]
        if errors:
            return _error(errors[0], 500, None)
        return JSONResponse(writer.whole(answers, collected))

    def _check_key(self, request: Request) -> None:
        """Checks the key of a client.

        Raises:
            BadRequest: If there is one, and the client has another.
        """
        if self._key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise BadRequest("The API key is missing or wrong.", 401)


async def _merged(answers: list[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """Yields the pieces of several answers as they come, each with its number."""
    if len(answers) == 1:
        async for piece in answers[0].read():
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

    async def read(number: int, answer: Answer) -> None:
        async for piece in answer.read():
            queue.put_nowait((number, piece))
        queue.put_nowait((number, None))

    tasks = [asyncio.create_task(read(i, answer)) for i, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            number, came = await queue.get()
            if came is None:
                left -= 1
            else:
                yield number, came
    finally:
        for task in tasks:
            task.cancel()


def _event(data: object) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _error(message: str, status: int, param: str | None) -> Response:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    about = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": about}, status)
