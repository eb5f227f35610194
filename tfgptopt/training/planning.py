"""How long and how fast to train, and the optimizer for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras

from tfgptopt.training.rates import SCHEDULES, learning_rate_schedule
from tfgptopt.training.replicas import prepare

OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "adamw": lambda rate, **k: keras.optimizers.AdamW(rate, weight_decay=0.05, beta_2=0.99, **k),
    "adam": lambda rate, **k: keras.optimizers.Adam(rate, beta_2=0.99, **k),
    "lion": lambda rate, **k: keras.optimizers.Lion(rate, weight_decay=0.05, **k),
    "adafactor": lambda rate, **k: keras.optimizers.Adafactor(rate, **k),
    "sgd": lambda rate, **k: keras.optimizers.SGD(rate, momentum=0.9, **k),
}


@dataclass(frozen=True)
class Training:
    """How long and how fast to train.

    Args:
        shared_steps: int. Steps before the dense and the optimized run part ways; 0 for a model
            that is trained already.
        steps: int. Steps of each of the two runs.
        learning_rate: float. Peak of the schedule over all steps.
        dense_run: bool. Also train the dense model for `steps`, as the fair comparison. If
            false, the dense model is the given one.
        lora: int. Rank of the LoRA adapters that train in the place of the weights in the
            optimized run. Defaults to `None`: all weights train.
        optimizer: `"adamw"`, `"adam"`, `"lion"`, `"adafactor"` or `"sgd"`, with their usual
            settings and gradients clipped to norm 1. Defaults to `"adamw"`.
        schedule: See `tfgptopt.training.learning_rate_schedule`. Defaults to `"cosine"`.
        accumulate: int. Parts of a batch; see `tfgptopt.training.prepare`. Defaults to `1`.

    Raises:
        ValueError: If a number is out of range, or a name is not known.
    """

    shared_steps: int
    steps: int
    learning_rate: float
    dense_run: bool = True
    lora: int | None = None
    optimizer: str = "adamw"
    schedule: str = "cosine"
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.lora is not None and (not isinstance(self.lora, int) or self.lora < 1):
            raise ValueError(f"`lora` must be an int >= 1, or None. Received: {self.lora!r}")
        if self.shared_steps < 0 or self.steps < 1 or not self.learning_rate > 0:
            raise ValueError(
                "`shared_steps` must be >= 0, `steps` >= 1 and `learning_rate` > 0. "
                f"Received: {self}"
            )
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)}. Received: {getattr(self, name)!r}"
                )
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"`accumulate` must be an int >= 1. Received: {self.accumulate!r}")

    @property
    def total(self) -> int:
        """All steps that one model sees."""
        return self.shared_steps + self.steps


def optimizer_for(training: Training) -> keras.optimizers.Optimizer:
    """Returns the optimizer, with the schedule as its learning rate."""
    rate = learning_rate_schedule(training.schedule, training.learning_rate, training.total)
    return OPTIMIZERS[training.optimizer](rate, global_clipnorm=1.0)


def compile_model(model: keras.Model, training: Training) -> None:
    """Compiles a model that brings its own losses, and prepares it for replicas and parts.

    Args:
        model: A causal LM, which then samples greedily, or a `Distiller`.
        training: How it is trained.
    """
    settings = {"sampler": "greedy"} if hasattr(model, "generate") else {}
    model.compile(optimizer=optimizer_for(training), weighted_metrics=[], **settings)
    prepare(model, training.accumulate)
