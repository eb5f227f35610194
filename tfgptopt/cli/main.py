"""The command line: `tfgptopt` with a command."""

from __future__ import annotations

import os
import sys
import warnings

import typer
from rich.console import Console
from rich.markup import escape

from tfgptopt.cli.bench import bench
from tfgptopt.cli.chat import chat
from tfgptopt.cli.demo import demo
from tfgptopt.cli.evaluate import evaluate
from tfgptopt.cli.export import export
from tfgptopt.cli.generate import generate
from tfgptopt.cli.inspect import inspect
from tfgptopt.cli.optimize import optimize
from tfgptopt.cli.quantize import quantize

app = typer.Typer(
    help="Make GPTs written in Keras small and fast while they train, and ship what was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    demo,
    optimize,
    quantize,
    export,
    evaluate,
    inspect,
    generate,
    chat,
    bench,
):
    app.command()(command)


def main() -> None:
    """Runs the command line; a user's mistake is one sentence and exit code 1."""
    # TensorFlow and LiteRT talk a lot; what a user must know is printed by us.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", module="keras")
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(f"Unexpected {type(error).__name__}: {error}")
    finally:
        # LiteRT logs while the process unloads it, when no code of ours runs any more.
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _fail(message: str) -> None:
    """Prints an error and ends with exit code 1."""
    errors = Console(stderr=True, highlight=False)
    errors.print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True)
    sys.exit(1)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object
) -> None:
    """Shows warnings of this package as one line."""
    if "tfgptopt" in filename or "callbacks" in filename:
        Console(stderr=True, highlight=False).print(
            f"[yellow]Note:[/yellow] {escape(str(message))}"
        )


if __name__ == "__main__":
    main()
