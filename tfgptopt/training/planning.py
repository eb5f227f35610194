"""How long and how fast to train, and the optimizer for that."""

from __future__ import annotations

from dataclasses import dataclass

import keras


@dataclass(frozen=True)
class Training:
    """How long and how fast to train.

    Args:
        shared_steps: int. Steps before the dense and the optimized run part ways; 0 for a model
            that is trained already.
        steps: int. Steps of each of the two runs.
        learning_rate: float. Peak of the warmup and cosine decay over all steps.
        dense_run: bool. Also train the dense model for `steps`, as the fair comparison. If
            false, the dense model is the given one.
        lora: int. Rank of the LoRA adapters that train in the place of the weights in the
            optimized run. Defaults to `None`: all weights train.

    Raises:
        ValueError: If a number is out of range.
    """

    shared_steps: int
    steps: int
    learning_rate: float
    dense_run: bool = True
    lora: int | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and (not isinstance(self.lora, int) or self.lora < 1):
            raise ValueError(f"`lora` must be an int >= 1, or None. Received: {self.lora!r}")
        if self.shared_steps < 0 or self.steps < 1 or not self.learning_rate > 0:
            raise ValueError(
                "`shared_steps` must be >= 0, `steps` >= 1 and `learning_rate` > 0. "
                f"Received: {self}"
            )

    @property
    def total(self) -> int:
        """All steps that one model sees."""
        return self.shared_steps + self.steps


def optimizer_for(training: Training) -> keras.optimizers.Optimizer:
    """Returns AdamW with warmup and cosine decay."""
    warmup = max(1, training.total // 15)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(1, training.total - warmup),
        alpha=0.03,
        warmup_target=training.learning_rate,
        warmup_steps=warmup,
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.05, beta_2=0.99, global_clipnorm=1.0)


def compile_model(model: keras.Model, training: Training) -> None:
    """Compiles a causal LM with AdamW, warmup and cosine decay."""
    model.compile(optimizer=optimizer_for(training), sampler="greedy", weighted_metrics=[])
