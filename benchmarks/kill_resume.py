"""Kills a training at random moments, resumes it, and compares every bit with one that ran through.

The training prunes by movement, rounds with learned scales and distils, with dropout and shuffled
data. A third of the kills (SIGKILL) hit it while it writes a checkpoint, every tenth is a SIGTERM.

    python benchmarks/kill_resume.py
    python benchmarks/kill_resume.py --kills 4 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_STEPS, _EVERY = 160, 5


def _gpt(seed: int) -> Any:
    import keras
    import keras_hub

    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.GPT2Backbone(300, 2, 2, 32, 64, dropout=0.1, max_sequence_length=32)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def train(folder: str) -> None:
    """Trains, with checkpoints in a folder if it has a name, and prints a hash of what is left."""
    import keras
    import numpy as np
    import tensorflow as tf
    from tfgptopt.callbacks import Checkpoint, Pruning, QuantizationAwareTraining

    import tfgptopt
    from tfgptopt.distillation import HardLabels, LogitsKL
    from tfgptopt.pruning import Movement, PolynomialDecay
    from tfgptopt.quantization import Int8

    class Pace(keras.callbacks.Callback):
        """Tells the parent that a step is done, and takes its time."""

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            print("step", flush=True)
            time.sleep(0.02)

    teacher, student = _gpt(5), _gpt(6)
    distiller = tfgptopt.Distiller(student, teacher, [LogitsKL(2.0), HardLabels(0.5)])
    distiller.compile(optimizer=keras.optimizers.AdamW(1e-3))
    tokens = np.random.default_rng(0).integers(0, 300, (160, 17), np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((160, 16), np.int32)}
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:]))
    data = data.shuffle(160, seed=3).batch(8)
    schedule = PolynomialDecay(0.0, 0.6, 10, _STEPS - 40, frequency=6)
    callbacks = [
        Pruning(schedule, score=Movement()),
        QuantizationAwareTraining(Int8(scale="learned"), freeze_step=_STEPS - 30),
        Pace(),
    ]
    if folder:
        callbacks.append(Checkpoint(folder, save_freq=_EVERY, keep=2))
    distiller.fit(data, epochs=_STEPS // 20, shuffle=False, verbose=0, callbacks=callbacks)
    digest = hashlib.sha256()
    for value in [*distiller.get_weights(), *(v.numpy() for v in distiller.optimizer.variables)]:
        digest.update(value.tobytes())
    print("end", int(distiller.optimizer.iterations), digest.hexdigest(), flush=True)


def start(folder: str) -> subprocess.Popen[str]:
    """Starts a training in a process of its own."""
    command = [sys.executable, __file__, "--child", folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> str:
    """Returns the last line of a training that has to end by itself."""
    out, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"A training failed with {child.returncode}:\n{errors[-2000:]}")
    return out.strip().splitlines()[-1]


def kill(folder: Path, i: int, generator: random.Random) -> str:
    """Starts a training and kills it; returns in words when."""
    child = start(str(folder))
    assert child.stdout is not None
    steps = generator.randint(1, _STEPS - 5)
    for _ in range(steps):
        child.stdout.readline()
    in_save = i % 3 == 0
    if in_save:
        while not list(folder.glob(".step-*")) and child.poll() is None:
            pass
        time.sleep(generator.uniform(0.0, 0.02))
    else:
        time.sleep(generator.uniform(0.0, 0.04))
    number = signal.SIGTERM if i % 10 == 9 else signal.SIGKILL
    child.send_signal(number)
    child.communicate()
    left = sorted(path.name for path in folder.glob("*step-*"))
    where = "in a save" if any(name.startswith(".") for name in left) else "between saves"
    saved = [name for name in left if not name.startswith(".")]
    return (
        f"{signal.Signals(number).name} behind step {steps}, {where}, exit {child.returncode}, "
        f"{saved[-1] if saved else 'nothing'} saved"
    )


def main() -> None:
    """Kills, resumes, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        train(arguments.child)
        return
    generator = random.Random(arguments.seed)
    whole = finish(start(""))
    print(f"not killed, no checkpoints: {whole}", flush=True)
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.kills):
            mine = Path(folder) / f"run{i}"
            words = kill(mine, i, generator)
            resumed = finish(start(str(mine)))
            equal += resumed == whole
            print(f"{i + 1:2}: {words}: {'equal' if resumed == whole else resumed}", flush=True)
    print(f"{equal} of {arguments.kills} resumed runs ended with the same bits")
    raise SystemExit(equal != arguments.kills)


if __name__ == "__main__":
    main()
