"""A progress bar for `fit` that fits in 80 columns."""

from __future__ import annotations

import time
from typing import Any

import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TrainingProgress(keras.callbacks.Callback):
    """Shows steps, steps per second, loss and sparsity in one line for the whole `fit`.

    Use it with `verbose=0`. It also keeps what it showed, for plots.

    Args:
        description: str. What is being trained. Defaults to `"training"`.
        console: `rich.console.Console`. Defaults to `None`: standard output.
        every: int. Steps between two entries of `history`. Defaults to `25`.

    Attributes:
        history: List of `(step, loss, sparsity)`, the loss averaged since the entry before.

    Example:

    ```python
    schedule = PolynomialDecay(0.0, 0.5, begin_step=2, end_step=6)
    progress = TrainingProgress("fine-tuning", every=2)
    model.fit(data, epochs=2, verbose=0, callbacks=[Pruning(schedule), progress])
    print(progress.history[-1])     # (step, loss, sparsity)
    ```
    """

    def __init__(
        self, description: str = "training", console: Console | None = None, every: int = 25
    ) -> None:
        super().__init__()
        self.every = every
        self.description = description
        self.history: list[tuple[int, float, float]] = []
        self._console = console or Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = 0.0
        self._first_step = 0
        self._done = self._epoch_start = self._timed_from = 0
        self._seen = (0, 0.0)
        self._resumed: dict[str, Any] | None = None

    def get_state(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold, as plain data."""
        return {
            "first_step": self._first_step,
            "done": self._done,
            "epoch_start": self._epoch_start,
            "seen": self._seen,
            "history": self.history,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` returned."""
        self._first_step = state["first_step"]
        self.history = [(step, loss, share) for step, loss, share in state["history"]]
        self._resumed = state
        if self._bar is not None:
            self._bar.update(self._task, completed=state["done"], shown="resumed")

    def _resume(self, first: int) -> None:
        """Goes on behind the first batches of an epoch."""
        state, self._resumed = self._resumed, None
        if state is not None:
            self._done = state["done"]
            self._epoch_start = state["epoch_start"] if first else state["done"]
            if first:
                count, total = state["seen"]
                self._seen = (count, total)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._first_step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        steps, epochs = self.params.get("steps"), self.params.get("epochs") or 1
        self._done = self._timed_from = 0
        self._bar = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:>5.0f}/{task.total}"),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )
        total = steps * epochs if steps else None
        self._task = self._bar.add_task(self.description, total=total, shown="compiling")
        self._bar.start()
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        assert self._bar is not None
        self._resume(batch + 1 - self.model.steps_per_execution)
        before, done = self._done, self._epoch_start + batch + 1
        self._done = done
        if not self._timed_from:  # The first step compiles; the rate counts from its end.
            self._started, self._timed_from = time.perf_counter(), done
        rate = (done - self._timed_from) / max(time.perf_counter() - self._started, 1e-9)
        logs = logs or {}
        shown = f"{rate:4.1f}/s loss {float(logs.get('loss', float('nan'))):.3f}"
        if "sparsity" in logs:
            shown += f" {logs['sparsity']:4.0%} zero"
        self._bar.update(self._task, completed=done, shown=shown)
        if done // self.every > before // self.every or done == self._bar.tasks[0].total:
            self._record(done, batch + 1, logs)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._seen = (0, 0.0)
        self._epoch_start = self._done

    def _record(self, done: int, in_epoch: int, logs: dict[str, float]) -> None:
        """Adds an entry. Keras gives the mean loss of the epoch so far, this keeps the change."""
        total = float(logs.get("loss", float("nan"))) * in_epoch
        before, total_before = self._seen
        loss = (total - total_before) / (in_epoch - before)
        self._seen = (in_epoch, total)
        self.history.append((self._first_step + done, loss, float(logs.get("sparsity", 0.0))))

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        if self._bar is not None:
            self._bar.stop()
