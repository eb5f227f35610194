"""`tfgptopt serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer


def serve(
    file: Annotated[Path, typer.Argument(help="A .tflite or .litertlm file written by tfgptopt.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for one that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the file's name.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TFGPTOPT_API_KEY", help="What clients must send. Default: nothing."),
    ] = None,
    queue: Annotated[int, typer.Option(help="Texts that may wait.")] = 64,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer. Default: the context.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
) -> None:
    """Serve a file over HTTP, as OpenAI's clients expect it. Needs the extra `server`."""
    try:
        import uvicorn

        from tfgptopt.serving import Limits, create_app
    except ImportError as error:
        raise ImportError(f"Serving needs {error.name}: pip install 'tfgptopt[server]'.") from error
    from tfgptopt.generation import TFLiteCausalLM

    limits = Limits(queue=queue, new_tokens=max_new_tokens)
    listener = _listener(host, port)
    model = TFLiteCausalLM(file, threads)
    app = create_app(model, name, limits, api_key)
    address = f"http://{host}:{listener.getsockname()[1]}"
    together = max(model.batch_sizes, default=1)
    typer.echo(f"{file.name} on {address}/v1, {together} at once. Ctrl-C ends it.")
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    """Returns a socket, before anything is loaded.

    Raises:
        ValueError: If the address cannot be had.
    """
    try:
        return socket.create_server((host, port), backlog=512)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Cannot listen on {host}:{port}: {error}. Choose another with --port, or 0 for one "
            "that is free."
        ) from None
