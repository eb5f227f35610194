"""`tfgptopt generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def generate(
    file: Annotated[Path, typer.Argument(help="A .tflite file written by tfgptopt.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_length: Annotated[
        int | None, typer.Option(help="Tokens, prompt included. Default: the whole context.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="greedy, random, top_k, top_p or min_p. Default: greedy, or what follows."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Above 1 for more variety, below for less.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from tokens with so much probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens this share as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens of the text so far get less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text to stop at; may be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
) -> None:
    """Continue a text with an exported file. Needs neither TensorFlow nor Keras."""
    from tfgptopt.generation import (
        MinP,
        Random,
        RepetitionPenalty,
        TFLiteCausalLM,
        TopK,
        TopP,
        samplers,
    )
    from tfgptopt.generation.samplers import Sampler

    settings: list[tuple[Callable[..., Sampler], float | None]] = [
        (Random, temperature),
        (TopK, top_k),
        (TopP, top_p),
        (MinP, min_p),
    ]
    chain: list[Sampler] = [make(value) for make, value in settings if value is not None]
    if sampler is not None or not chain:
        chain += samplers.get(sampler or "greedy")
    if repetition_penalty is not None:
        chain.insert(0, RepetitionPenalty(repetition_penalty))
    lm = TFLiteCausalLM(file, threads)
    pieces = lm.stream(prompt, max_length, chain, stop or "auto", seed)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
