"""`tfgptopt generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfgptopt.cli.shared import FILE_SUFFIXES

if TYPE_CHECKING:
    from tfgptopt.generation.constraints import Constraint
    from tfgptopt.generation.guessing import Speculation
    from tfgptopt.generation.samplers import Sampler

SamplerName = Annotated[
    str | None,
    typer.Option(help="greedy, random, top_k, top_p or min_p. Default: greedy, or what follows."),
]
Temperature = Annotated[
    float | None, typer.Option(help="Above 1 for more variety, below for less.")
]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Draw from so many tokens.")]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", help="Draw from tokens with so much probability together."),
]
MinPOption = Annotated[
    float | None,
    typer.Option("--min-p", help="Draw from tokens this share as likely as the likeliest."),
]


SpeculativeName = Annotated[
    str | None,
    typer.Option(help="auto: guess from the text itself; or the file of a draft model."),
]


def speculation_of(name: str | None) -> Speculation | str | None:
    """Returns what an option stands for: a name that ends as files do is that of a draft."""
    from tfgptopt.generation import Draft

    return Draft(name) if name is not None and name.endswith(FILE_SUFFIXES) else name


def generate(
    file: Annotated[Path, typer.Argument(help="A .tflite or .litertlm file written by tfgptopt.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_length: Annotated[
        int | None, typer.Option(help="Tokens, prompt included. Default: the whole context.")
    ] = None,
    sampler: SamplerName = None,
    temperature: Temperature = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens of the text so far get less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text to stop at; may be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Names of special tokens in the prompt are those, not text."
        ),
    ] = False,
    speculative: SpeculativeName = None,
    regex: Annotated[
        str | None, typer.Option(help="What the continuation must be: a regular expression.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="The same: a file with a JSON schema.")
    ] = None,
    beams: Annotated[
        int | None, typer.Option(help="Find the likeliest text as a whole with so many beams.")
    ] = None,
) -> None:
    """Continue a text with an exported file. Needs neither TensorFlow nor Keras."""
    from tfgptopt.generation import Beam, TFLiteCausalLM

    chain = chain_of(sampler, temperature, top_k, top_p, min_p, repetition_penalty)
    constraint = constraint_of(regex, json_schema)
    lm = TFLiteCausalLM(file, threads)
    if beams is not None:
        if chain != chain_of(None, None, None, None, None, None) or constraint or speculative:
            raise ValueError("Give --beams without a sampler, a form or guesses: they go alone.")
        best = lm.generate(prompt, max_length, Beam(beams), stop or "auto",
                           special_tokens=special_tokens)  # fmt: skip
        sys.stdout.write(best + "\n")
        return
    pieces = lm.stream(prompt, max_length, chain, stop or "auto", seed, special_tokens,
                       speculation_of(speculative), constraint)  # fmt: skip
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def constraint_of(regex: str | None, json_schema: Path | None) -> Constraint | None:
    """Returns what the options hold a text to.

    Raises:
        ValueError: If both are given.
    """
    from tfgptopt.generation import JsonSchema, Regex

    if regex is not None and json_schema is not None:
        raise ValueError("Give --regex or --json-schema, not both.")
    if json_schema is not None:
        return JsonSchema(json_schema.read_text("utf-8"))
    return None if regex is None else Regex(regex)


def chain_of(
    sampler: str | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
) -> list[Sampler]:
    """Returns the samplers that the options stand for, greedy without any."""
    from tfgptopt.generation import MinP, Random, RepetitionPenalty, TopK, TopP, samplers

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
    return chain
