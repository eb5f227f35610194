"""`tfgptopt chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tfgptopt.cli.generate import (
    MinPOption,
    SamplerName,
    SpeculativeName,
    Temperature,
    TopKOption,
    TopPOption,
    chain_of,
    speculation_of,
)
from tfgptopt.cli.shared import template_or_file

_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    file: Annotated[Path, typer.Argument(help="A .tflite or .litertlm file written by tfgptopt.")],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="gemma, gemma4, llama3, chatml, qwen, smollm, phi3, or a file of Jinja. "
            "Default: the file's own."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer. Default: the whole context.")
    ] = None,
    sampler: SamplerName = None,
    temperature: Temperature = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
    speculative: SpeculativeName = None,
) -> None:
    """Chat with an exported file. Needs neither TensorFlow nor Keras."""
    from tfgptopt.generation import TFLiteCausalLM

    chain = chain_of(sampler, temperature, top_k, top_p, min_p, None)
    guesses = speculation_of(speculative)
    conversation = TFLiteCausalLM(file, threads).chat(system, template_or_file(template), guesses)

    def answer(message: str) -> Iterator[str]:
        return conversation.stream(message, max_new_tokens, chain, "auto", seed)

    console = Console(highlight=False)
    talk = sys.stdin.isatty()
    if talk:
        console.print(f"[dim]{_HELP}[/dim]")
    for message in _messages(console, talk):
        if message == "/quit":
            return
        if message == "/reset":
            conversation.reset()
        elif message.startswith("/") and talk:
            console.print(f"[dim]{_HELP}[/dim]")
        else:
            _print_answer(answer, message)


def _messages(console: Console, talk: bool) -> Iterator[str]:
    """Yields what a person says, a line at a time; without a terminal, the lines of the input."""
    while True:
        try:
            line = console.input("[bold]> [/bold]") if talk else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line and not talk:
            return
        if line.strip():
            yield line.strip()


def _print_answer(answer: Callable[[str], Iterator[str]], message: str) -> None:
    """Prints an answer as it comes. Ctrl-C stops it, and a message that does not fit is said."""
    try:
        for piece in answer(message):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        Console(stderr=True, highlight=False).print(
            f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True
        )
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
