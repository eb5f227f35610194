"""Quantization-aware training during `fit`."""

from __future__ import annotations

import warnings
from typing import Any

import keras
from tfgptopt.callbacks.pruning import last_mask_step

from tfgptopt.quantization import layers
from tfgptopt.quantization.specs import Spec
from tfgptopt.quantization.training import check_spec, quantize_aware
from tfgptopt.targets import Selector, select


class QuantizationAwareTraining(keras.callbacks.Callback):
    """Trains a model with the rounded arithmetic that it will ship with.

    The layers' own calls run on rounded weights and rounded inputs, inside the compiled train
    step. `evaluate` and `generate` use the same arithmetic, so the metrics of the progress bar are
    the metrics of the exported file. It stays so after `fit`, until `tfgptopt.finalize(model)`.

    Args:
        spec: `Int8()` or `Int4()`.
        targets: Which weights to round: a regular expression on their paths, a layer class, or a
            callable. Defaults to `None`: kernels of Dense and EinsumDense and tables of Embedding
            and ReversibleEmbedding, the head tied to the table included.
        start_step: int. Value of `optimizer.iterations` from which on to round. The train step is
            traced once more there. Defaults to `0`.

    Raises:
        ValueError: If `spec` or `start_step` is out of range; in `fit`, before the first step, if
            nothing matches or the layers already round to another spec.

    Example:

    ```python
    from tfgptopt.callbacks import QuantizationAwareTraining
    from tfgptopt.quantization import Int8

    model.fit(data, callbacks=[QuantizationAwareTraining(Int8())])
    ```

    Reference: Jacob et al., 2018 (https://arxiv.org/abs/1712.05877).
    """

    def __init__(self, spec: Spec, targets: Selector | None = None, start_step: int = 0) -> None:
        super().__init__()
        check_spec(spec)
        if not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"`start_step` must be an int >= 0. Received: {start_step!r}")
        self.spec = spec
        self.selector = targets
        self.start_step = start_step
        self._waiting = True

    def _iterations(self) -> int:
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def set_model(self, model: keras.Model) -> None:
        # Keras does this for all callbacks of a `fit` before any may change the model.
        super().set_model(model)
        targets = select(model, self.selector, roles=("kernel", "head", "embedding"))
        specs = [getattr(t.layer, "quantization_spec", None) for t in targets]
        dressed = [layers.is_dressed(t.layer) for t in targets]
        # A second `fit` with the same settings, such as a notebook cell run again, continues.
        self._waiting = not (all(dressed) and all(spec == self.spec for spec in specs))
        if self._waiting and any(dressed):
            raise ValueError(
                f"Layers of '{model.name}' are quantize-aware already, with "
                f"{specs[dressed.index(True)]}. Received: {self.spec}. "
                "Call `tfgptopt.finalize(model)` first to change it."
            )

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        last = last_mask_step(self.model, self._iterations(), self.params)
        if last is not None and last < self.start_step:
            warnings.warn(
                f"Rounding begins at step {self.start_step}, but the last step of this training is "
                f"{last}: nothing will be quantized.",
                stacklevel=2,
            )
        self._dress_if_due()

    def _dress_if_due(self) -> None:
        if self._waiting and self._iterations() >= self.start_step:
            quantize_aware(self.model, self.spec, self.selector)
            self._waiting = False

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._waiting:
            self._dress_if_due()
