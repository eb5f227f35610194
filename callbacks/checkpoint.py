"""Checkpoints from which a killed training goes on as if nothing had happened."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

import keras
import numpy as np

from tfgptopt.model.changing import build_optimizer
from tfgptopt.model.types import Config
from tfgptopt.training import run_state
from tfgptopt.training.checkpoint_files import CheckpointFolder, SavedCheckpoint
from tfgptopt.training.data_position import RunningFit, data_watch
from tfgptopt.training.sharding import each_worker, together, worker_count

_WEIGHTS = "model.weights.h5"
_AGREE_EVERY = 10  # Batches of several workers, which takes them about a millisecond.


class Checkpoint(keras.callbacks.Callback):
    """Saves a training while it runs; the same `fit` in a new process goes on where it stopped.

    A checkpoint is a folder with everything that the run is made of: weights, the optimizer, masks,
    scores and scales, the position in the data, the random state of dropout, samplers, Keras, numpy
    and Python, the metrics of the epoch, and what the run was made with. The folder is written
    beside and renamed, and its files are read back for their checksums. A resumed run sees exactly
    the batches that it would have seen: those before are read again and dropped, and a hash of all
    of them is compared before anything is trained.

    On SIGTERM, as machines that are taken away send it, the training saves behind the running step
    and ends the process with exit code `Checkpoint.EXIT_CODE` (75, "try again later").

    When a `fit` ends, its last checkpoint says so: the same script restores the trained model and
    trains no further. Another `fit` of the same model in the same process goes on.

    Args:
        folder: Where checkpoints are; one for each `fit`.
        save_freq: int, batches between two checkpoints; `"epoch"`, at the end of each epoch; or
            `None`, where `minutes` says when. Defaults to `100`.
        keep: int >= 1. How many checkpoints to keep. Defaults to `3`.
        minutes: float. Also saves when so many minutes have passed since the last time. Defaults
            to `None`: never.

    Raises:
        ValueError: If a setting is out of range; in `fit`, before the first step, if the folder
            cannot be written to, is full or is in use, all checkpoints in it are damaged, they are
            of another model, optimizer, recipe or data, or the data is shuffled without a seed.

    Example:

    ```python
    keras.utils.set_random_seed(1)
    from tfgptopt.callbacks import Checkpoint

    model.fit(data, callbacks=[Checkpoint("run/checkpoints", save_freq=100)])
    ```
    """

    EXIT_CODE: ClassVar[int] = 75

    def __init__(
        self,
        folder: str | Path,
        save_freq: int | Literal["epoch"] | None = 100,
        keep: int = 3,
        minutes: float | None = None,
    ) -> None:
        super().__init__()
        _check_settings(save_freq, keep, minutes)
        self.folder = CheckpointFolder(Path(folder), keep)
        self.save_freq, self.minutes = save_freq, minutes
        self._fit: RunningFit | None = None
        self._identity: Config = {}
        self._begin = self._base = self._seen = self._epoch = self._in_epoch = 0
        self._saved_at = -1
        self._last_time = 0.0
        self._metrics: list[np.ndarray] | None = None
        self._remembered: tuple[list[Config], dict[str, np.ndarray]] | None = None
        self._asked = self._stopping = self._epoch_ended = self._waiting = False
        self._workers, self._writes = 1, True
        self._previous: Any = None

    # Beginning

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        strategy = self.model.distribute_strategy
        self._workers = worker_count(strategy)
        self._writes = bool(strategy.extended.should_checkpoint)
        fit = self._fit = RunningFit.of_caller()
        with together(strategy):
            self._check_alone(fit)
            known = self.folder.was_used_here
            if self._writes:
                self.folder.open()
        known = bool(each_worker(strategy, known)[0])
        try:
            self._restore_or_begin(fit, known)
        except BaseException:
            if not known:
                self.folder.close()
            raise
        self._last_time = time.monotonic()
        self._listen()

    def _check_alone(self, fit: RunningFit) -> None:
        for other in fit.callbacks:
            same = isinstance(other, Checkpoint) and other.folder.path == self.folder.path
            if same and other is not self:
                raise ValueError(f"Two Checkpoints write to '{self.folder.path}'. Use one.")

    def _restore_or_begin(self, fit: RunningFit, known: bool) -> None:
        model = self.model
        with together(model.distribute_strategy):
            self._check_model(fit)
        self._begin = self._iterations()
        self._seen = self._epoch = self._in_epoch = self._base = 0
        self._saved_at, self._metrics = -1, None
        self._asked = self._stopping = self._epoch_ended = self._waiting = False
        watch = data_watch(model)
        watch.start((0, 0))
        saved = self._newest()
        if saved is None:
            return
        if saved.facts["finished"] and self._begin == saved.facts["iterations"] > 0:
            self._base = saved.step  # Another `fit` of a model that was trained here.
            return
        with together(model.distribute_strategy):
            self._check_same(saved, known)
        watch.start(self._go_to(fit, saved.facts))
        self._restore(fit, saved)

    def _check_model(self, fit: RunningFit) -> None:
        model = self.model
        if not model.built:
            raise ValueError(
                f"'{model.name}' is not built, so there is nothing to restore a checkpoint into. "
                "Call it on a batch before `fit`."
            )
        build_optimizer(model)
        fit.check_order()
        steps = fit.batches.num_batches
        self._identity = run_state.identity_of(model, fit.callbacks, steps)
        if self._writes:
            variables = [*model.variables, *model.optimizer.variables]
            sizes = [int(np.prod(v.shape)) * v.value.dtype.size for v in variables]
            self.folder.check_room(sum(sizes))

    def _newest(self) -> SavedCheckpoint | None:
        """Returns the checkpoint to go on from: on all workers the one that the first chose."""
        strategy = self.model.distribute_strategy
        saved = None
        with together(strategy):
            if self._writes:
                saved = self.folder.newest()
        step = each_worker(strategy, -1 if saved is None else saved.step)[0]
        with together(strategy):
            if step >= 0 and not self._writes:
                saved = self.folder.at(step)
        return saved

    def _check_same(self, saved: SavedCheckpoint, known: bool) -> None:
        where = f"The checkpoints in '{self.folder.path}' are of"
        other = run_state.difference(self._identity, saved.facts["identity"])
        if other is None and not known and saved.facts["begin"] != self._begin:
            other = (
                f"another `fit`: it began at step {saved.facts['begin']} of the optimizer, and "
                f"this one begins at {self._begin}"
            )
        if other is not None:
            raise ValueError(f"{where} {other}. To begin anew, give another folder.")

    def _go_to(self, fit: RunningFit, facts: Config) -> tuple[int, int]:
        """Brings the data to where it was, and returns number and hash of the batches before."""
        strategy = self.model.distribute_strategy
        expected = tuple(facts["data"])
        if self._has_ended(facts):
            return int(expected[0]), int(expected[1])
        if fit.replay(facts["epoch"], facts["in_epoch"], strategy) != expected:
            raise ValueError(
                f"The checkpoints in '{self.folder.path}' are of other data: of {expected[0]} "
                "batches before, at least one is another now, or they come in another order. Give "
                "the same data, shuffled with the same seed; to begin anew, give another folder."
            )
        return int(expected[0]), int(expected[1])

    def _restore(self, fit: RunningFit, saved: SavedCheckpoint) -> None:
        facts, model = saved.facts, self.model
        model.load_weights(saved.path / _WEIGHTS)
        arrays = run_state.read_state(saved.path)
        run_state.restore_random(model, arrays)
        self._remembered = (facts["callbacks"], arrays)
        self._metrics = run_state.saved_metrics(arrays) if facts["in_epoch"] else None
        self._begin, self._seen = facts["begin"], saved.step
        self._epoch, self._in_epoch = facts["epoch"], facts["in_epoch"]
        self._saved_at = saved.step
        model._initial_epoch = facts["epoch"]
        if self._has_ended(facts):
            model._initial_epoch = max(self.params["epochs"], facts["epoch"])
            run_state.restore_callbacks(self._others(fit), *self._remembered)
            warnings.warn(
                f"The training in '{self.folder.path}' had ended after {saved.step} steps: its "
                "model was restored, and is not trained again. To train anew, give another folder.",
                stacklevel=2,
            )

    def _has_ended(self, facts: Config) -> bool:
        """Returns whether nothing is left to train; more epochs may be asked for than before."""
        return bool(facts["finished"]) and self.params["epochs"] <= facts["epochs"]

    def _others(self, fit: RunningFit) -> list[keras.callbacks.Callback]:
        return [one for one in fit.callbacks if one is not self]

    def _iterations(self) -> int:
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    # While it runs

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.model._initial_epoch = None  # It would begin the next `fit`, too.
        self._restore_callbacks()
        if self._waiting or (self._epoch_ended and self.save_freq == "epoch"):
            self._save()
        self._epoch_ended = self._waiting = False
        self._stop_if_asked()
        if epoch != self._epoch:
            self._epoch, self._in_epoch = epoch, 0
        if self._metrics is not None and len(self.model.metrics_variables) == len(self._metrics):
            run_state.add_metrics(self.model, self._metrics)
            self._metrics = None

    def _restore_callbacks(self) -> None:
        """Gives other callbacks back what they remembered, once all have begun."""
        if self._remembered is not None and self._fit is not None:
            run_state.restore_callbacks(self._others(self._fit), *self._remembered)
        self._remembered = None

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self._metrics is not None:  # They are made with the first step of a process.
            run_state.add_metrics(self.model, self._metrics)
            self._metrics = None
        before, done = self._seen, batch + 1 - self._in_epoch
        self._seen, self._in_epoch = before + done, batch + 1
        due = isinstance(self.save_freq, int) and (
            self._seen // self.save_freq > before // self.save_freq
        )
        late = self._agree(before)
        if not (due or late or self._stopping):
            return
        # Where an epoch ends, others have to see its end before: its validation, its history.
        steps = self._fit.batches.num_batches if self._fit is not None else None
        self._waiting = steps is not None and batch + 1 >= steps
        if not self._waiting:
            self._save()
            self._stop_if_asked()

    def _agree(self, before: int = -1) -> bool:
        """Returns whether it is time to save by the clock, and learns whether to stop.

        One of several workers may be the only one that is told to: they ask each other now and
        then, all behind the same step.
        """
        late = self.minutes is not None and (
            time.monotonic() - self._last_time >= 60 * self.minutes
        )
        strategy, every = self.model.distribute_strategy, _AGREE_EVERY if self._workers > 1 else 1
        if self._seen // every == before // every:
            return False
        asked = each_worker(strategy, 2 * self._asked + late)
        self._stopping = self._stopping or max(asked) >= 2
        return any(one % 2 for one in asked)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._agree()
        self._epoch, self._in_epoch, self._epoch_ended = epoch + 1, 0, True
        self._metrics = None
        self._waiting = self._waiting or self._stopping

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self.model._initial_epoch = None
        self._restore_callbacks()
        self._in_epoch = 0
        self._agree()
        self._save(finished=True)
        self._stop_if_asked()
        self._end()

    # Saving

    def _facts(self, finished: bool) -> Config:
        assert self._fit is not None
        return {
            "begin": self._begin,
            "iterations": self._iterations(),
            "epoch": self._epoch,
            "in_epoch": self._in_epoch,
            "data": list(data_watch(self.model).seen),
            "epochs": self.params["epochs"],
            "finished": finished,
            "identity": self._identity,
            "callbacks": run_state.callback_states(self._others(self._fit)),
        }

    def _save(self, finished: bool = False) -> None:
        step, facts = self._base + self._seen, self._facts(finished)
        assert self._fit is not None
        arrays = run_state.gather_state(self.model, self._others(self._fit))

        def fill(path: Path) -> None:
            self.model.save_weights(path / _WEIGHTS)
            run_state.write_state(path, arrays)

        self._last_time = time.monotonic()
        if not self._writes:
            return  # Another worker writes.
        try:
            self.folder.write(step, fill, facts)
        except (OSError, ValueError, RuntimeError) as error:
            last = f"the last one is of step {self._saved_at}" if self._saved_at >= 0 else "none is"
            warnings.warn(
                f"The checkpoint of step {step} could not be written ({error}). The training goes "
                f"on; {last} in '{self.folder.path}'.",
                stacklevel=2,
            )
            return
        self._saved_at = step

    # Ending

    def _listen(self) -> None:
        """Lets SIGTERM end the training behind a step."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGTERM, self._on_signal)
            owner = getattr(previous, "__self__", None)  # Another, whose `fit` failed.
            self._previous = owner._previous if isinstance(owner, Checkpoint) else previous

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._fit is not None and self._fit.is_below(frame):
            self._asked, self._stopping = True, self._workers == 1
            return
        # The `fit` ended with an error, and nobody looks at a wish to stop any more.
        signal.signal(number, self._previous or signal.SIG_DFL)
        signal.raise_signal(number)

    def _stop_if_asked(self) -> None:
        if self._stopping:
            self._end()
            raise SystemExit(self.EXIT_CODE)

    def _end(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        self._fit, self._previous = None, None
        self.folder.close()


def _check_settings(save_freq: Any, keep: Any, minutes: Any) -> None:
    """Raises if a setting is out of range.

    Raises:
        ValueError: If one is.
    """
    number = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq >= 1
    if not (number or save_freq == "epoch" or (save_freq is None and minutes is not None)):
        raise ValueError(
            "`save_freq` must be an int >= 1, 'epoch', or None together with `minutes`. "
            f"Received: {save_freq!r}"
        )
    if not isinstance(keep, int) or keep < 1:
        raise ValueError(f"`keep` must be an int >= 1. Received: {keep!r}")
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise ValueError(f"`minutes` must be a number > 0, or None. Received: {minutes!r}")
