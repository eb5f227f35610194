"""Progress of calls that take seconds, shown as `verbose` says, spelled as Keras spells it.

A call that a user makes says `with showing(verbose)`; what works below it says `stage` or `track`,
and need not know whether somebody looks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

Verbose = Literal["auto", 0, 1, 2]

_Item = TypeVar("_Item")

# Seconds between two lines of a stage where there is no bar.
_BETWEEN_LINES = 15.0


class _Looker(NamedTuple):
    """Who looks at progress: a console, and 0 for nothing, 1 for bars or 2 for lines."""

    console: Console
    level: int


# `None` where no call has said yet who looks.
_looker: ContextVar[_Looker | None] = ContextVar("looker", default=None)


def check_verbose(verbose: Verbose) -> None:
    """Raises unless `verbose` is known.

    Raises:
        ValueError: If it is not.
    """
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(
            "`verbose` must be 'auto', 0 (silent), 1 (progress bar) or 2 (lines). "
            f"Received: {verbose!r}"
        )


@contextmanager
def showing(verbose: Verbose, console: Console | None = None) -> Iterator[None]:
    """Shows the progress of what is called inside.

    Args:
        verbose: 0 is silent, 1 shows bars (lines where the output is a file), 2 prints lines.
            `"auto"` is what a call around this one said, else bars in terminals and notebooks, and
            nothing elsewhere.
        console: Where to. Defaults to `None`: standard output.

    Raises:
        ValueError: If `verbose` is unknown.
    """
    check_verbose(verbose)
    if verbose == "auto" and _looker.get() is not None:
        yield
        return
    console = console or Console(highlight=False)
    seen = console.is_terminal or console.is_jupyter
    level = int(seen) if verbose == "auto" else int(verbose)
    if level == 1 and not seen:
        level = 2  # A file cannot move a bar.
    before = _looker.set(_Looker(console, level))
    try:
        yield
    finally:
        _looker.reset(before)


class Stage:
    """A part of a call, of known length or not.

    Attributes:
        total: Amount of work, in any unit; `None` if it is not known.
    """

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total = description, total
        self._done, self._began = 0.0, time.perf_counter()

    def advance(self, amount: float = 1.0) -> None:
        """Says that so much more of the work is done."""
        self._done += amount
        self._show()

    def say(self, description: str) -> None:
        """Says what is being done now, such as `"GPTQ, block 3 of 18"`."""
        self.description = description
        self._show()

    def _show(self) -> None:
        """Shows how things stand, if somebody looks."""

    def _end(self) -> None:
        """Takes away what was shown."""

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self._began

    @property
    def left(self) -> str:
        """The time left, as far as the work so far tells it."""
        if not self.total or self._done <= 0:
            return f"{_clock(self.seconds)} so far"
        share = min(self._done / self.total, 1.0)
        return f"{_clock(self.seconds * (1.0 - share) / share)} left"


class _Bar(Stage):
    """Shows a bar, which goes away at the end."""

    def __init__(self, description: str, total: float | None, console: Console) -> None:
        super().__init__(description, total)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Left(self),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task(description, total=total)
        self._progress.start()

    def _show(self) -> None:
        self._progress.update(self._task, completed=self._done, description=self.description)

    def _end(self) -> None:
        self._progress.stop()


class _Left(ProgressColumn):
    """The time left of a stage."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def render(self, task: Task) -> Text:
        """Returns the text."""
        return Text(self._stage.left)


class _Lines(Stage):
    """Prints a line now and then, and one at the end: for log files."""

    def __init__(self, description: str, total: float | None, console: Console) -> None:
        super().__init__(description, total)
        self._console, self._said, self._name = console, 0.0, description

    def _show(self) -> None:
        if self.seconds - self._said >= _BETWEEN_LINES:
            self._said = self.seconds
            self._print(f"{self.description}: {self.left}")

    def _end(self) -> None:
        self._print(f"{self._name}: {self.seconds:.1f} s")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def stage(description: str, total: float | None = None) -> Iterator[Stage]:
    """Shows a part of a call while it runs, if the call is one whose progress is shown.

    Args:
        description: What is being done.
        total: Amount of work, in any unit. Defaults to `None`: it is not known.
    """
    looker = _looker.get()
    if looker is None or not looker.level:
        yield Stage(description, total)
        return
    kind = _Bar if looker.level == 1 else _Lines
    shown = kind(description, total, looker.console)
    try:
        yield shown
    finally:
        shown._end()


def track(items: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
    """Yields items, and shows how many of them are done.

    Args:
        items: Any iterable.
        description: What is done with them.
        total: How many there are. Defaults to `None`: their length, if they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with stage(description, total) as shown:
        for item in items:
            yield item
            shown.advance()
