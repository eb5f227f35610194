"""How the learning rate moves over the steps, and how it differs between weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from tfgptopt.model.types import Config
from tfgptopt.training.reducing import inner_optimizers

_schedules = keras.optimizers.schedules
LearningRate = float | keras.optimizers.schedules.LearningRateSchedule

SCHEDULES = ("cosine", "linear", "polynomial", "exponential", "inverse_sqrt", "wsd", "constant")
# What decays end with, as a share of the peak.
_FLOOR = 0.03


@keras.saving.register_keras_serializable("tfgptopt")
class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Rises from 0 to `peak` in a straight line, and goes on with another schedule.

    Keras' `CosineDecay` warms up by itself; this puts a warmup in front of any schedule.

    Args:
        peak: float. The rate at the end of the warmup.
        warmup_steps: int. Steps of the warmup, in updates of the optimizer.
        after: Keras `LearningRateSchedule`, counted from the end of the warmup. Defaults to
            `None`: the rate stays at `peak`.

    Raises:
        ValueError: If a number is out of range.

    Example:

    ```python
    from tfgptopt.training import Warmup

    decay = keras.optimizers.schedules.ExponentialDecay(1e-3, 100, 0.5)
    model.compile(optimizer=keras.optimizers.AdamW(Warmup(1e-3, 20, decay)))
    ```

    Reference: Goyal et al., 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour"
    (https://arxiv.org/abs/1706.02677).
    """

    def __init__(
        self,
        peak: float,
        warmup_steps: int,
        after: keras.optimizers.schedules.LearningRateSchedule | None = None,
    ) -> None:
        _check(peak=peak, warmup_steps=warmup_steps)
        super().__init__()
        self.peak, self.warmup_steps, self.after = peak, warmup_steps, after

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        later = ops.maximum(step - self.warmup_steps, 0.0)
        rate = self.peak if self.after is None else self.after(later)
        rising = self.peak * step / max(1, self.warmup_steps)
        return ops.where(step < self.warmup_steps, rising, rate)

    def get_config(self) -> Config:
        after = None if self.after is None else _schedules.serialize(self.after)
        return {"peak": self.peak, "warmup_steps": self.warmup_steps, "after": after}

    @classmethod
    def from_config(cls, config: Config) -> Warmup:
        config = dict(config)
        if config.get("after") is not None:
            config["after"] = _schedules.deserialize(config["after"])
        return cls(**config)


@keras.saving.register_keras_serializable("tfgptopt")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """Falls as `peak * sqrt(scale / (step + scale))`, without an end: for runs of open length.

    Args:
        peak: float. The rate at step 0.
        scale: int of 1 or more. Steps after which the rate is `peak / sqrt(2)`; behind a `Warmup`,
            the length of the warmup gives the schedule of the paper.

    Raises:
        ValueError: If a number is out of range.

    Reference: Vaswani et al., 2017, "Attention Is All You Need"
    (https://arxiv.org/abs/1706.03762).
    """

    def __init__(self, peak: float, scale: int) -> None:
        _check(peak=peak, scale=scale)
        super().__init__()
        self.peak, self.scale = peak, max(1, scale)

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        return self.peak * ops.sqrt(self.scale / (step + float(self.scale)))

    def get_config(self) -> Config:
        return {"peak": self.peak, "scale": self.scale}


@keras.saving.register_keras_serializable("tfgptopt")
class StableDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Stays at `peak`, and falls in a straight line at the end: WSD behind a `Warmup`.

    A run can be lengthened at its peak without having planned for it.

    Args:
        peak: float. The rate of the stable part.
        stable_steps: int. Its length, in updates of the optimizer.
        decay_steps: int of 1 or more. Length of the decay.
        floor: float. Where the decay ends. Defaults to `0.0`.

    Raises:
        ValueError: If a number is out of range.

    Reference: Hu et al., 2024, "MiniCPM: Unveiling the Potential of Small Language Models with
    Scalable Training Strategies" (https://arxiv.org/abs/2404.06395); Hägele et al., 2024
    (https://arxiv.org/abs/2405.18392), for the straight line.
    """

    def __init__(
        self, peak: float, stable_steps: int, decay_steps: int, floor: float = 0.0
    ) -> None:
        _check(peak=peak, stable_steps=stable_steps, decay_steps=decay_steps)
        super().__init__()
        self.peak, self.stable_steps, self.floor = peak, stable_steps, floor
        self.decay_steps = max(1, decay_steps)

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        done = ops.clip((step - self.stable_steps) / self.decay_steps, 0.0, 1.0)
        return self.peak + (self.floor - self.peak) * done

    def get_config(self) -> Config:
        return {
            "peak": self.peak,
            "stable_steps": self.stable_steps,
            "decay_steps": self.decay_steps,
            "floor": self.floor,
        }


def _check(**numbers: float) -> None:
    """Raises unless `peak` is above 0 and the rest are counts.

    Raises:
        ValueError: If one is out of range.
    """
    for name, value in numbers.items():
        if name == "peak":
            if not isinstance(value, int | float) or not 0.0 < value < float("inf"):
                raise ValueError(f"`peak` must be a number above 0. Received: {value!r}")
        elif not isinstance(value, int) or value < 0:
            raise ValueError(f"`{name}` must be an int >= 0. Received: {value!r}")


def learning_rate_schedule(
    name: str, peak: float, steps: int, warmup_steps: int | None = None
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns a schedule with warmup, made of Keras' own where they exist.

    Steps are updates of the optimizer: with `prepare(model, accumulate=4)` a batch is one step.

    Args:
        name: `"cosine"`, `"linear"`, `"polynomial"` (a square), `"exponential"`, each down to 3
            percent of the peak; `"inverse_sqrt"`; `"wsd"`, whose last fifth decays; or
            `"constant"`.
        peak: float. The largest rate.
        steps: int. All steps, the warmup included.
        warmup_steps: int. Defaults to `None`: a fifteenth of all steps.

    Returns:
        Keras `LearningRateSchedule`, which can be serialized.

    Raises:
        ValueError: If the name is not known, or a number is out of range.

    Example:

    ```python
    from tfgptopt.training import learning_rate_schedule

    rate = learning_rate_schedule("wsd", peak=3e-4, steps=1000)
    model.compile(optimizer=keras.optimizers.AdamW(rate))
    ```
    """
    if name not in SCHEDULES:
        raise ValueError(f"A schedule is one of {', '.join(SCHEDULES)}. Received: {name!r}")
    warmup = max(1, steps // 15) if warmup_steps is None else warmup_steps
    _check(peak=peak, steps=steps, warmup_steps=warmup)
    rest, floor = max(1, steps - warmup), _FLOOR * peak
    if name == "cosine":
        return _schedules.CosineDecay(
            0.0, rest, alpha=_FLOOR, warmup_target=peak, warmup_steps=warmup
        )
    decay = rest // 5
    after = {
        "linear": lambda: _schedules.PolynomialDecay(peak, rest, floor),
        "polynomial": lambda: _schedules.PolynomialDecay(peak, rest, floor, power=2.0),
        "exponential": lambda: _schedules.ExponentialDecay(peak, rest, _FLOOR),
        "inverse_sqrt": lambda: InverseSquareRoot(peak, warmup),
        "wsd": lambda: StableDecay(peak, rest - decay, decay, floor),
        "constant": lambda: None,
    }[name]()
    return Warmup(peak, warmup, after)


def set_rates(model: keras.Model, rates: Mapping[str, float]) -> None:
    """Multiplies the learning rate of groups of weights, in steps that are compiled from now on.

    Of decoupled weight decay, as AdamW has it, they get the same share.

    Args:
        model: A compiled model.
        rates: Regular expressions on the paths of weights to factors of 0 or more; the first that
            matches counts, and 1 where none does. An empty one undoes it.

    Raises:
        ValueError: If the model is not compiled, nothing matches an expression, or a factor is
            negative.

    Example:

    ```python
    from tfgptopt.training import set_rates

    set_rates(model, {"embedding": 0.1, "layer_norm|bias": 2.0})
    model.fit(data)
    ```

    Reference: Howard and Ruder, 2018, "Universal Language Model Fine-tuning for Text
    Classification" (https://arxiv.org/abs/1801.06146), for rates by layer.
    """
    if getattr(model, "optimizer", None) is None:
        raise ValueError("The model is not compiled, so there is no learning rate yet.")
    paths = [variable.path for variable in model.trainable_variables]
    for pattern, factor in rates.items():
        if not isinstance(factor, int | float) or not 0.0 <= factor < float("inf"):
            raise ValueError(f"A factor must be a number >= 0. Received: {pattern!r}: {factor!r}")
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"No trainable weight matches {pattern!r}. There are, for example: "
                f"{', '.join(paths[:5])}"
            )
    for optimizer in inner_optimizers(model.optimizer):
        _scale(optimizer, model, dict(rates))
    if model.train_function is not None:
        model.make_train_function(force=True)


def _scale(optimizer: Any, model: keras.Model, rates: dict[str, float]) -> None:
    """Lets an optimizer update groups of variables one after the other, with their own rates."""
    for name in ("_backend_update_step", "_apply_weight_decay"):
        if name in vars(optimizer):
            object.__delattr__(optimizer, name)
    if not rates:
        return
    key = optimizer._var_key
    factors = {
        key(variable): next((f for p, f in rates.items() if re.search(p, variable.path)), 1.0)
        for variable in model.trainable_variables
    }

    def groups(variables: Any) -> dict[float, list[int]]:
        found: dict[float, list[int]] = {}
        for i, variable in enumerate(variables):
            found.setdefault(factors.get(key(variable), 1.0), []).append(i)
        return found

    plain_update: Callable[..., None] = optimizer._backend_update_step
    plain_decay: Callable[..., None] = optimizer._apply_weight_decay

    def update(grads: Any, variables: Any, learning_rate: Any) -> None:
        for factor, chosen in groups(variables).items():
            rate = ops.multiply(learning_rate, factor)
            plain_update([grads[i] for i in chosen], [variables[i] for i in chosen], rate)

    def decay(variables: Any) -> None:
        own = optimizer.weight_decay
        if own is None:
            return
        try:
            for factor, chosen in groups(variables).items():
                object.__setattr__(optimizer, "weight_decay", own * factor)
                plain_decay([variables[i] for i in chosen])
        finally:
            object.__setattr__(optimizer, "weight_decay", own)

    object.__setattr__(optimizer, "_backend_update_step", update)
    object.__setattr__(optimizer, "_apply_weight_decay", decay)
