"""Quantization-aware training during `fit`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
from tfgptopt.callbacks.pruning import last_mask_step

from tfgptopt.distillation.distiller import Distiller
from tfgptopt.model.changing import build_optimizer, changing, strategy_scope
from tfgptopt.model.current import full_precision, has_adapters
from tfgptopt.model.retracing import retrace
from tfgptopt.model.targets import Selector, Target
from tfgptopt.model.types import Data
from tfgptopt.quantization import layers, quantizers
from tfgptopt.quantization.aware import hold_scales, quantize_aware
from tfgptopt.quantization.bit_allocation import BitAllocation
from tfgptopt.quantization.learned import scale_updates
from tfgptopt.quantization.post_training import Method, quantize
from tfgptopt.quantization.quantizers import Quantizer
from tfgptopt.quantization.specs import Spec
from tfgptopt.quantization.technique import QuantizeAware
from tfgptopt.training.replicas import prepare_replicas


class QuantizationAwareTraining(keras.callbacks.Callback):
    """Trains a model with the rounded arithmetic that it will ship with.

    The layers' own calls run on rounded weights and rounded inputs, inside the compiled train
    step. `evaluate` and `generate` use the same arithmetic, so the metrics of the progress bar are
    the metrics of the exported file. It stays so after `fit`, until `tfgptopt.finalize(model)`.

    Args:
        spec: `Int8()` or `Int4()`, or what `tfgptopt.quantization.allocate` returned. Several
            callbacks with different `targets` give groups of weights specs of their own.
        targets: Which weights to round: a regular expression on their paths, a layer class, or a
            callable. Defaults to `None`: kernels of Dense and EinsumDense and tables of Embedding
            and ReversibleEmbedding, the head included, frozen or not.
        start_step: int. Value of `optimizer.iterations` from which on to round. The train step is
            traced once more there. Defaults to `0`.
        freeze_step: int. Value of `optimizer.iterations` from which on the scales stay as they
            are, so that the last steps settle the weights on a grid that does not move. Defaults
            to `None`: never.
        method: How weights are rounded where rounding begins, as `tfgptopt.quantize` has it: for 4
            bits `"gptq"` is the best start. The scales that it finds stay, unless the spec learns
            them. Defaults to `"rtn"`: to nearest, with the scales of the spec at each step.
        data: Calibration data for `method`, as `tfgptopt.quantize` takes it. Defaults to `None`.

    Raises:
        ValueError: If a setting is out of range; in `fit`, before the first step, if nothing
            matches, a weight does not fit, the layers already round to another spec, or the method
            has no data.

    Example:

    ```python
    from tfgptopt.callbacks import QuantizationAwareTraining
    from tfgptopt.quantization import Int8

    model.fit(data, callbacks=[QuantizationAwareTraining(Int8())])
    ```

    Reference: Jacob et al., 2018 (https://arxiv.org/abs/1712.05877).
    """

    def __init__(
        self,
        spec: Spec | BitAllocation,
        targets: Selector | None = None,
        start_step: int = 0,
        freeze_step: int | None = None,
        method: Method | Sequence[Method] = "rtn",
        data: Data = None,
    ) -> None:
        super().__init__()
        self.technique = QuantizeAware(spec, targets, start_step, freeze_step, method)
        self._data = data
        self._chosen: list[tuple[Target, Spec]] = []
        self._waiting = True
        self._learning: list[Quantizer] = []
        self._frozen = False
        # The steps that were traced with weights that do not train; they are good as long as the
        # step that was put in their place, the first of them, is untouched.
        self._traced: tuple[Any, Any, Any] | None = None

    @classmethod
    def of(cls, technique: QuantizeAware, calibration: Data = None) -> QuantizationAwareTraining:
        """Returns the callback that carries out a technique.

        Args:
            technique: The technique.
            calibration: Data for a method that needs some. Defaults to `None`.
        """
        return cls(
            technique.spec, technique.targets, technique.start_step, technique.freeze_step,
            technique.method, calibration,
        )  # fmt: skip

    def _iterations(self) -> int:
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def set_model(self, model: keras.Model) -> None:
        # Keras does this for all callbacks of a `fit` before any may change the model.
        super().set_model(model)
        if self.technique.needs_data and self._data is None:
            raise ValueError(
                f"method={self.technique.method!r} needs calibration data: give `data`. Received: "
                "data=None"
            )
        prepare_replicas(model)
        self._chosen = self.technique.check(model)
        held = [layers.spec_of(t.layer) if layers.is_dressed(t.layer) else None
                for t, _ in self._chosen]  # fmt: skip
        # A second `fit` with the same settings, such as a notebook cell run again, continues.
        self._waiting = held != [spec for _, spec in self._chosen]
        if self._waiting and any(held):
            raise ValueError(
                f"Layers of '{model.name}' are quantize-aware already, with "
                f"{next(filter(None, held))}. Received: {self.technique.spec}. "
                "Call `tfgptopt.finalize(model)` first to change it."
            )
        self._frozen = False
        for target, spec in self._chosen:
            # Whatever loads a checkpoint later, kept scales find their place.
            quantizers.attach(target, spec)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._round_anew()  # After a `fit` that was interrupted.
        last = last_mask_step(self.model, self._iterations(), self.params)
        if last is not None and last < self.technique.start_step:
            warnings.warn(
                f"Rounding begins at step {self.technique.start_step}, but the last step of this "
                f"training is {last}: nothing will be quantized.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        # Not when the training begins: another callback may still fail there.
        self._dress_if_due()
        self._learn_scales()
        self._freeze_if_due()
        self._round_frozen_once()
        build_optimizer(self.model)

    def _round_frozen_once(self) -> None:
        """Keeps the rounded form of weights that this training does not change."""
        if self._waiting:
            return
        trained = {id(variable) for variable in self.model.trainable_variables}
        found = [
            quantizer
            for target, _ in self._chosen
            if not has_adapters(target.layer)
            for quantizer in quantizers.quantizers_of(target.layer)
            if id(quantizer.variable) not in trained and quantizer.given is None
        ]
        if not found:
            return
        same = self._traced is not None and self._traced[0] is self.model.train_function
        with strategy_scope(self.model) if same else changing(self.model):
            for quantizer in found:
                quantizer.give(quantizer.rounded(full_precision(quantizer.variable)))
        if same and self._traced is not None:
            _, self.model.train_function, self.model.test_function = self._traced

    def _round_anew(self) -> None:
        chosen = [target.layer for target, _ in self._chosen]
        found = [one for layer in chosen for one in quantizers.quantizers_of(layer)]
        given = [one for one in found if one.given is not None]
        if given:
            functions = self.model.train_function, self.model.test_function
            with changing(self.model):
                for quantizer in given:
                    quantizer.give(None)
            self._traced = (self.model.train_function, *functions)

    def _dress_if_due(self) -> None:
        if self._waiting and self._iterations() >= self.technique.start_step:
            self._dress()
            self._waiting = False
            self._learn_scales()

    def _dress(self) -> None:
        technique = self.technique
        rounders = [one for t, _ in self._chosen for one in quantizers.quantizers_of(t.layer)]
        # A run that is resumed has what the method found.
        if technique.method == "rtn" or any(one.has_scale for one in rounders):
            quantize_aware(self.model, technique.spec, technique.targets)
            return
        # A student knows its start token, the Distiller around it does not.
        model = self.model.student if isinstance(self.model, Distiller) else self.model
        with changing(self.model):
            quantize(model, technique.spec, technique.method, self._data, technique.targets)

    def _learn_scales(self) -> None:
        learned = [
            quantizer
            for target, spec in self._chosen
            for quantizer in quantizers.quantizers_of(target.layer)
            if spec.scale == "learned" and quantizer.kept is not None
        ]
        if learned and not (self._waiting or self._frozen or self._learning):
            updates = scale_updates(self.model)
            with strategy_scope(self.model):
                is_new = updates.add(learned)
                updates.learn(learned, True)
            self._learning = learned
            if is_new:
                retrace(self.model)

    def _freeze_if_due(self) -> None:
        due = (
            self.technique.freeze_step is not None
            and self._iterations() >= self.technique.freeze_step
        )
        if due and not self._waiting and not self._frozen:
            self._stop_learning()
            frozen = [target.layer for target, _ in self._chosen]
            found = [one for layer in frozen for one in quantizers.quantizers_of(layer)]
            kept = all(one.kept is not None for one in found)
            with strategy_scope(self.model) if kept else changing(self.model):
                hold_scales(frozen)
            self._frozen = True

    def _stop_learning(self) -> None:
        if self._learning:
            scale_updates(self.model).learn(self._learning, False)
        self._learning = []

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self._waiting:
            self._dress_if_due()
            self._round_frozen_once()
        if self.technique.freeze_step is not None and not self._frozen:
            self._freeze_if_due()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        # A run that is resumed behind its last epoch began none.
        self._dress_if_due()
        self._freeze_if_due()
        self._stop_learning()
        self._round_anew()
