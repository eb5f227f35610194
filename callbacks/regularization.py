"""Regularization during `fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tfgptopt.model.changing import build_optimizer
from tfgptopt.model.targets import Selector
from tfgptopt.model.types import Data
from tfgptopt.pruning.penalties import Penalizer
from tfgptopt.pruning.regularizing import Regularize, overlap

_CLAIMS = "_tfgptopt_penalty_claims"


class Regularization(keras.callbacks.Callback):
    """Penalizes weights while `fit` trains them, inside the compiled step.

    The penalty is part of the loss. Together with `Pruning(Threshold(...))` it becomes sparsity:
    what it drives near zero goes. Logs show `penalty`, and `near_zero`: the share of the weights
    (or of the groups of a `GroupLasso`) whose magnitude is below a tenth of the root mean square of
    their weight, which is what a threshold will find. A `fit` without the callback has no penalty.

    With an optimizer that scales gradients by their size, such as Adam, a penalty pulls on weights
    of small gradients more than on others: choose `strength` by what `near_zero` shows.

    Args:
        penalty: `keras.regularizers.L1(1e-5)`, `L2`, `L1L2`, `GroupLasso(1e-5, pattern)` towards
            n:m, blocks, rows or columns, or your own callable from a matrix `(inputs, outputs)` to
            a number.
        targets: Which weights: a regular expression on their paths, a layer class, or a callable.
            Defaults to `None`: kernels of Dense and EinsumDense, wherever they are, but the head.
        log_freq: int >= 1. Batches from one measurement for the logs to the next. Defaults to `50`.

    Raises:
        ValueError: If a setting is out of range; in `fit`, before the first step, if nothing
            matches, a weight cannot have the pattern, or another Regularization acts on it.

    Example:

    ```python
    from tfgptopt.callbacks import Regularization
    from tfgptopt.pruning import Threshold

    regularization = Regularization(keras.regularizers.L1(1e-4))
    threshold = Threshold(0.1, relative_to="rms", begin_step=2, frequency=2)
    model.fit(data, callbacks=[regularization, Pruning(threshold)])
    ```

    Reference: Han et al., 2015 (https://arxiv.org/abs/1506.02626).
    """

    def __init__(
        self, penalty: Callable[[Any], Any], targets: Selector | None = None, log_freq: int = 50
    ) -> None:
        super().__init__()
        if not isinstance(log_freq, int) or log_freq < 1:
            raise ValueError(f"`log_freq` must be an int >= 1. Received: {log_freq!r}")
        self.technique = Regularize(penalty, targets)
        self.log_freq = log_freq
        self._penalizer: Penalizer | None = None
        self._measured = (0.0, 0.0)

    @classmethod
    def of(cls, technique: Regularize, calibration: Data = None) -> Regularization:
        """Returns the callback that carries out a technique, which needs no calibration data."""
        return cls(technique.penalty, technique.targets)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        chosen = self.technique.check(model)
        self._penalizer = Penalizer.on(model, chosen, self.technique.penalty)
        # Keras does this for all callbacks of a `fit` before the first of them begins.
        object.__setattr__(model, _CLAIMS, {})

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        assert self._penalizer is not None
        claims = getattr(self.model, _CLAIMS)
        for target in self._penalizer.targets:
            if claims.setdefault(id(target.variable), self) is not self:
                raise ValueError(overlap(target))

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        # Not when the training begins: another callback may still fail there.
        assert self._penalizer is not None
        self._penalizer.attach()
        self._penalizer.switch(True)
        build_optimizer(self.model)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        assert self._penalizer is not None
        execution = self.model.steps_per_execution
        if batch // self.log_freq > (batch - execution) // self.log_freq:
            self._measured = self._penalizer.measure()
        self._log(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert self._penalizer is not None
        self._measured = self._penalizer.measure()
        self._log(logs)

    def _log(self, logs: dict[str, float] | None) -> None:
        if logs is not None:
            logs["penalty"], logs["near_zero"] = self._measured

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        if self._penalizer is not None:
            self._penalizer.switch(False)
