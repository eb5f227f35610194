"""`tfgptopt export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfgptopt.cli.shared import Force, load, load_libraries, print_size, template_or_file


def export(
    preset: Annotated[str, typer.Argument(help="KerasHub preset: a folder or a name.")],
    path: Annotated[Path, typer.Argument(help="A name with .tflite or .litertlm, or a folder.")],
    recipe: Annotated[
        Path | None, typer.Option(help="recipe.yaml of the training. Default: as stored, float32.")
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(help="TFLite, LiteRTLM: positions of the cache. Default: all of the model."),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(help="TFLite, LiteRTLM: float32 or int8, keys and values in it. [float32]"),
    ] = None,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="TFLite: leave out empty blocks of float32 weights.")
    ] = False,
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option(help="TFLite: texts that can be decoded together; several times for more."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="TFLite: preset of a smaller model that guesses, in the same file."),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="gemma, chatml, ..., or a file of Jinja. Default: the model's own."),
    ] = None,
    growing_cache: Annotated[
        bool, typer.Option("--growing-cache", help="LiteRTLM: the cache grows with a text.")
    ] = False,
    accelerator: Annotated[
        str | None, typer.Option(help="LiteRTLM: cpu, or gpu for a form that was not tried on one.")
    ] = None,
    force: Force = False,
) -> None:
    """Export a model as TFLite, for LiteRT-LM (both with a KV cache), or as a SavedModel."""
    load_libraries()
    import tfgptopt
    from tfgptopt.exporting.formats import format_of
    from tfgptopt.file.replacing import check_target
    from tfgptopt.recipe import Recipe

    check_target(path, force)
    options = {
        "context_length": context_length,
        "cache_dtype": cache_dtype,
        "sparse": sparse or None,
        "batch_sizes": tuple(batch_sizes) if batch_sizes else None,
        "growing_cache": growing_cache or None,
        "accelerator": accelerator,
    }
    format = format_of(path, {name: x for name, x in options.items() if x is not None})
    loaded = Recipe.load(recipe) if recipe else None
    model = load(preset)
    if loaded:
        loaded.replay(model)
    guesses, turns = load(draft) if draft else None, template_or_file(chat_template)
    tfgptopt.export(model, path, format, force, draft=guesses, chat_template=turns)
    print_size(path)
