"""The command line: `tfgptopt` with a command."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.markup import escape

from tfgptopt.cli.advise import advise
from tfgptopt.cli.bench import bench
from tfgptopt.cli.chat import chat
from tfgptopt.cli.demo import demo
from tfgptopt.cli.doctor import doctor
from tfgptopt.cli.evaluate import evaluate
from tfgptopt.cli.export import export
from tfgptopt.cli.generate import generate
from tfgptopt.cli.inspect import inspect
from tfgptopt.cli.monitoring import monitoring
from tfgptopt.cli.optimize import optimize
from tfgptopt.cli.quantize import quantize
from tfgptopt.cli.report import report
from tfgptopt.cli.serve import serve
from tfgptopt.cli.shrink import shrink
from tfgptopt.cli.tune import tune

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
    tune,
    quantize,
    shrink,
    export,
    evaluate,
    report,
    inspect,
    generate,
    chat,
    serve,
    monitoring,
    bench,
    doctor,
    advise,
):
    app.command()(command)


def main() -> None:
    """The command line as a process."""
    # TensorFlow and LiteRT talk a lot; what a user must know is printed by us.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", module="keras")
    warnings.showwarning = _show_warning
    try:
        sys.exit(run_command(sys.argv[1:]))
    finally:
        # LiteRT logs while the process unloads it, when no code of ours runs any more.
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run_command(arguments: Sequence[str]) -> int:
    """Runs a command; a user's mistake is one sentence and exit code 1.

    Args:
        arguments: The words behind `tfgptopt`.

    Returns:
        The exit code.
    """
    try:
        app(list(arguments), prog_name="tfgptopt")
    except SystemExit as end:  # What typer ends with, after help and wrong options too.
        _print_notes(end)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _fail(f"Unexpected {type(error).__name__}: {error}")
    return 0


def _fail(message: str) -> int:
    """Prints an error, and returns the exit code for it."""
    errors = Console(stderr=True, highlight=False)
    errors.print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True)
    return 1


def _print_notes(end: BaseException | None) -> None:
    """Prints what is noted on the error that ended a command, Ctrl-C above all."""
    while end is not None:
        for note in getattr(end, "__notes__", ()):
            Console(stderr=True, highlight=False).print(escape(note), soft_wrap=True)
        end = end.__cause__ or end.__context__


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
