"""Does `tune` find a recipe for limits that only a combination meets?

    python benchmarks/tuning.py --out tuning --minutes 15

Trains the demo's GPT-2 (1.4 M weights, Python's standard library) once into `OUT/dense`, then
lets `tfgptopt tune` search on its own text.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

LIMITS = ("--max-size", "0.8MB", "--max-rise", "6%")


def train_dense(folder: Path, steps: int) -> None:
    """Trains the demo's dense model, and saves it as a preset."""
    import keras

    from tfgptopt.cli.demo import _DEMO_SHAPE
    from tfgptopt.data import load_corpus, tokens_as_input
    from tfgptopt.job.optimizing import small_gpt
    from tfgptopt.training.planning import Training, compile_model

    corpus = load_corpus(
        None, vocabulary_size=288, sequence_length=64, batch_size=16, validation_share=0.015
    )
    keras.utils.set_random_seed(0)
    model = small_gpt(corpus, **_DEMO_SHAPE)
    compile_model(model, Training(0, steps, 1.2e-3))
    with tokens_as_input(model):
        model.fit(corpus.train.repeat(), steps_per_epoch=steps, verbose=0)
    model.save_to_preset(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tuning"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--steps", type=int, default=1150)
    arguments = parser.parse_args()
    dense = arguments.out / "dense"
    if not dense.exists():
        dense.parent.mkdir(parents=True, exist_ok=True)
        train_dense(dense, arguments.steps)
    import sysconfig

    text = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    command = ["tune", str(text), "--preset", str(dense), "--sequence-length", "64", *LIMITS]
    command += ["--minutes", str(arguments.minutes), "--out", str(arguments.out / "tuned")]
    subprocess.run([sys.executable, "-m", "tfgptopt.cli.main", *command], check=True)


if __name__ == "__main__":
    main()
