"""Is a student made by shrinking and distillation better than other models of its size?

A 12-layer teacher is trained on the demo's corpus and shrunk to half its weights. Then three
students of that shape see the same tokens: one from random weights, one shrunk and fine-tuned
without the teacher, one shrunk and distilled. Seeds change the order of the text and the random
weights; the teacher is one. Prints held-out perplexities.

    python benchmarks/distillation.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import tfgptopt
from tfgptopt.data import Corpus, load_corpus, tokens_as_input
from tfgptopt.distillation import HardLabels, LogitsKL
from tfgptopt.evaluation.loss import keras_loss, perplexity
from tfgptopt.job.optimizing import small_gpt
from tfgptopt.shrinking import shape_of
from tfgptopt.shrinking.surgery import build

SHAPE = {
    "num_layers": 12,
    "num_heads": 4,
    "hidden_dim": 96,
    "intermediate_dim": 384,
    "max_sequence_length": 64,
}
RATE = 2e-3


def optimizer(steps: int) -> keras.optimizers.Optimizer:
    """Returns AdamW with warmup and cosine decay."""
    warmup = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, alpha=0.03, warmup_target=RATE, warmup_steps=warmup
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.05, beta_2=0.99, global_clipnorm=1.0)


def text(seed: int) -> Corpus:
    """Returns the demo's corpus in an order that depends on the seed."""
    return load_corpus(
        vocabulary_size=288, sequence_length=64, batch_size=16, validation_share=0.015, seed=seed
    )


def train(model: Any, corpus: Corpus, steps: int) -> None:
    """Trains a causal LM or a distiller."""
    more = {} if isinstance(model, tfgptopt.Distiller) else {"sampler": "greedy"}
    model.compile(optimizer=optimizer(steps), weighted_metrics=[], **more)
    with tokens_as_input(model):
        model.fit(corpus.train.repeat(), steps_per_epoch=steps, verbose=0, shuffle=False)


def measure(name: str, model: Any, corpus: Corpus, start: float) -> float:
    """Returns the held-out perplexity of a model."""
    with tokens_as_input(model):
        found = perplexity(keras_loss(model, corpus.validation))
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:5.1f} min  {name:<28} {found:.3f}", flush=True)
    return found


def main() -> None:
    """Trains the teacher, then the students of each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--student-steps", type=int, default=200)
    parser.add_argument("--hard-labels", type=float, default=0.5, help="Weight beside the logits.")
    parser.add_argument("--teacher", type=Path, help="Weights to read, or to write if missing.")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    start, steps = time.perf_counter(), settings.student_steps
    keras.utils.set_random_seed(0)
    corpus = text(seed=1000)
    teacher = small_gpt(corpus, **SHAPE)
    if settings.teacher and settings.teacher.is_file():
        teacher.load_weights(settings.teacher)
    else:
        train(teacher, corpus, settings.teacher_steps)
        if settings.teacher:
            teacher.save_weights(settings.teacher)
    rows: dict[str, list[float]] = {"teacher": [measure("teacher", teacher, corpus, start)]}
    shrunk = tfgptopt.shrink(teacher, parameters=0.5, calibration=corpus.train.take(16))
    first, shape = shrunk.get_weights(), shape_of(shrunk)
    share = shrunk.count_params() / teacher.count_params()
    print(f"students: {share:.1%} of {teacher.count_params():,} weights, {shape}", flush=True)
    rows["shrunk, untrained"] = [measure("shrunk, untrained", shrunk, corpus, start)]
    losses = [LogitsKL(), HardLabels(settings.hard_labels)]
    for seed in range(settings.seeds):
        keras.utils.set_random_seed(seed)
        corpus = text(seed)
        random = type(teacher)(build(teacher, shape), preprocessor=teacher.preprocessor)
        for name, model, weights in (
            ("shrunk and distilled", shrunk, first),
            ("shrunk and fine-tuned", shrunk, first),
            ("from random weights", random, None),
        ):
            if weights is not None:
                model.set_weights(weights)
            distilled = name == "shrunk and distilled"
            trained = tfgptopt.Distiller(model, teacher, losses) if distilled else model
            train(trained, corpus, steps)
            rows.setdefault(name, []).append(measure(name, model, corpus, start))
    print("\n| | median | by seed |\n|---|---|---|")
    for name, found in rows.items():
        each = ", ".join(f"{value:.2f}" for value in found)
        print(f"| {name} | {statistics.median(found):.2f} | {each} |")
    if settings.json:
        settings.json.write_text(json.dumps(rows, indent=1), "utf-8")


if __name__ == "__main__":
    main()
