"""One training of a job, with checkpoints that the same job goes on from."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf
from rich.console import Console

from tfgptopt.callbacks import Checkpoint, TrainingProgress
from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.job.outcome import Curve


def train(
    model: keras.Model,
    data: tf.data.Dataset,
    steps: int,
    name: str,
    console: Console,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    folder: Path | None = None,
) -> Curve:
    """Trains for a number of steps, over the data as often as it takes.

    Args:
        model: A compiled model.
        data: Batches of tokens.
        steps: How many batches.
        name: What is trained, in words.
        console: Where to show progress.
        callbacks: Callbacks besides. Defaults to none.
        folder: Where checkpoints of all trainings of a job are, which it goes on from. Defaults to
            `None`: there are none.

    Returns:
        The curve that was shown.
    """
    progress = TrainingProgress(name, console)
    # Behind all others, whose state it writes.
    saving = [] if folder is None else [Checkpoint(folder / name.replace(", ", "-"), keep=2)]
    with tokens_as_input(model), warnings.catch_warnings():
        # Which is right: a job that is resumed passes by those that were trained.
        warnings.filterwarnings("ignore", "The training in .* had ended")
        try:
            model.fit(
                data.repeat(),
                steps_per_epoch=steps,
                shuffle=False,
                verbose=0,
                callbacks=[*callbacks, progress, *saving],
            )
        finally:
            progress.on_train_end()
    return progress.history


def checkpoints_beside(target: Path, overwrite: bool, resume: bool) -> Path:
    """Returns where the checkpoints of a job are, which are removed for a new one.

    Raises:
        FileExistsError: If a job was stopped there, and nobody says what to do with it.
    """
    folder = target.with_name(f"{target.name}.checkpoints")
    if folder.exists() and not resume:
        if not overwrite:
            raise FileExistsError(
                f"'{folder}' holds a job that was stopped. Go on with it (`resume=True`, on the "
                "command line --resume), or begin anew (`overwrite=True`, --force)."
            )
        shutil.rmtree(folder)
    return folder
