"""Trains a student to do as a teacher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import keras
import tensorflow as tf

from tfgptopt.data.text import as_tokens, is_text
from tfgptopt.distillation.features import AttentionMaps, HiddenStates
from tfgptopt.distillation.losses import LogitsKL, Loss, weight_at
from tfgptopt.distillation.recording import Recording, split_inputs
from tfgptopt.distillation.serializing import is_serializable
from tfgptopt.distillation.teachers import (
    LiveTeacher,
    check_built,
    check_recording,
    live_teacher,
)
from tfgptopt.distillation.technique import Distill
from tfgptopt.distillation.views import Lesson, View, look
from tfgptopt.distillation.wiring import Wiring
from tfgptopt.model import masks
from tfgptopt.model.changing import build_optimizer
from tfgptopt.model.history import record
from tfgptopt.model.types import Config, Data
from tfgptopt.training.reducing import replica_count
from tfgptopt.training.replicas import PREPARED, build_for, make_function

_NOT_SAVED = (
    "A Distiller is not saved as a whole. Save `distiller.student`; to resume training, use "
    "`save_weights` or ModelCheckpoint(save_weights_only=True)."
)


def token_weights(inputs: Data, sample_weight: Any, tokens: tf.Tensor) -> tf.Tensor:
    """Returns how much each token counts: 0 for padding, else its sample weight.

    Args:
        inputs: What the model reads; a `padding_mask` in it marks real tokens.
        sample_weight: `(batch,)`, `(batch, tokens)`, or `None`.
        tokens: What has the shape `(batch, tokens)`, such as labels.

    Returns:
        float32 tensor of shape `(batch, tokens)`.
    """
    weights = tf.ones(tf.shape(tokens), tf.float32)
    mask = inputs.get("padding_mask") if isinstance(inputs, dict) else None
    for factor in (mask, sample_weight):
        if factor is not None:
            factor = tf.cast(factor, tf.float32)
            behind = [1] * (len(tokens.shape) - len(factor.shape))
            weights *= tf.reshape(factor, [*tf.unstack(tf.shape(factor)), *behind])
    return weights


def _checked(losses: Sequence[Loss] | None) -> list[Loss]:
    chosen = [LogitsKL()] if losses is None else losses
    if not isinstance(chosen, list | tuple) or not chosen:
        raise ValueError(
            "`losses` must be a non-empty list such as [LogitsKL(2.0), HardLabels(0.5)]. "
            f"Received: {losses!r}"
        )
    for loss in chosen:
        if isinstance(loss, type) or not isinstance(loss, Loss):
            raise ValueError(
                "A loss is a LogitsKL(), HardLabels(), HiddenStates() or AttentionMaps(). "
                f"Received: {loss!r}"
            )
    return list(chosen)


class Distiller(keras.Model):
    """Trains a student with what a teacher knows, in one compiled step.

    A Keras model: `compile(optimizer)`, `fit`, callbacks, `evaluate`, `save_weights` and
    strategies work as usual. It reads what the student reads, and calling it calls the student.
    `distiller.student` stays your model: `Pruning` and `QuantizationAwareTraining` given to
    `distiller.fit` act on it alone; finalize, save and export `distiller.student` afterwards.

    Each loss is a mean over real tokens: a token counts with its `padding_mask` times its
    `sample_weight`, over all replicas. Logs show the weighted sum as `loss`, and each term by
    its name.

    Args:
        student: A built Keras model from `{"token_ids", "padding_mask"}`, or other inputs, to
            logits `(batch, tokens, vocabulary)`.
        teacher: A model with the same inputs and vocabulary, which may be of another family,
            quantized or pruned. Or what `tfgptopt.distillation.record` wrote of one. Or `"self"`:
            a copy of the student as it is now, before it is compressed.
        losses: List of `LogitsKL`, `HardLabels`, `HiddenStates`, `AttentionMaps`. Defaults to
            `None`: `[LogitsKL()]`.
        name: str. Name of the model. Defaults to `"distiller"`.

    Raises:
        ValueError: If student or teacher is not a built model, vocabularies differ, or a loss is
            none or cannot compare the two models; in `fit`, if data was not recorded.

    Example:

    ```python
    distiller = tfgptopt.Distiller(student, teacher, losses=[LogitsKL(2.0), HardLabels(0.5)])
    distiller.compile(optimizer=keras.optimizers.AdamW(3e-4))
    distiller.fit(corpus.train, validation_data=corpus.validation, epochs=2)
    tfgptopt.export(distiller.student, "student.tflite")
    ```

    Reference: Hinton et al., 2015, "Distilling the Knowledge in a Neural Network"
    (https://arxiv.org/abs/1503.02531).
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model | Recording | Literal["self"],
        losses: Sequence[Loss] | None = None,
        name: str = "distiller",
    ) -> None:
        chosen = _checked(losses)
        check_built(student, "student")
        if isinstance(teacher, Recording):
            check_recording(student, teacher, chosen)
            source: LiveTeacher | Recording = teacher
            wiring = Wiring([])
        else:
            source = live_teacher(student, teacher)
            wiring = Wiring.between(student, source.model, chosen)
            source.hidden = wiring.watched(HiddenStates, 1)
            source.attention = wiring.watched(AttentionMaps, 1)
        super().__init__(name=name)
        self.student = student
        # Neither is a layer of this one: nothing of them is trained, saved or dressed.
        self.teacher = source
        self._wiring = wiring
        self._teaching = _Untracked(chosen)
        wiring.add_projections(self)
        self._terms = [keras.metrics.Mean(name=n) for n in _names(chosen)]
        self._traced: Any = None
        self.built = True
        object.__setattr__(self, PREPARED, True)  # Its methods do what `prepare` adds to others.

    @property
    def distillation_losses(self) -> list[Loss]:
        """The losses, in the order in which they were given."""
        return list(self._teaching.value)

    def call(self, inputs: Data, training: bool | None = None) -> Any:
        """Returns what the student gives."""
        return self.student(split_inputs(inputs)[0], training=training)

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        loss: Any = None,
        **kwargs: object,
    ) -> None:
        """Configures training, as `keras.Model.compile` does, but for the losses.

        Raises:
            ValueError: If `loss` is given: losses are arguments of the `Distiller`.
        """
        if loss is not None:
            raise ValueError(
                "The losses of a Distiller are given when it is made: "
                f"`Distiller(student, teacher, losses=[...])`. Received: loss={loss!r}"
            )
        super().compile(optimizer=optimizer, **kwargs)

    def _lesson(self, inputs: Data, recorded: Any) -> Lesson:
        if isinstance(self.teacher, LiveTeacher):
            return Lesson(view=self.teacher.look(inputs), pairs=self._wiring.projections)
        if recorded is None:
            raise ValueError(
                "The batch has nothing that was recorded of it. `fit` and `evaluate` add it to a "
                "tf.data.Dataset; in a loop of your own, read `recording.attach(dataset)`."
            )
        return Lesson(top_k=recorded)

    def _look(self, inputs: Data, training: bool) -> View:
        hidden = self._wiring.watched(HiddenStates, 0)
        return look(self.student, inputs, hidden, self._wiring.watched(AttentionMaps, 0), training)

    def _loss(self, student: View, lesson: Lesson, labels: Data, weights: tf.Tensor) -> tf.Tensor:
        """Returns this replica's loss as Keras scales it, and updates the means that logs show."""
        if labels is not None:
            # A label of padding may be anything, such as -100, whose gradient is NaN on some
            # devices.
            labels = tf.convert_to_tensor(labels)
            if labels.shape.rank == weights.shape.rank:
                labels = tf.where(weights > 0, labels, tf.zeros_like(labels))
        count = tf.reduce_sum(weights)
        total = tf.zeros(())
        for loss, metric in zip(self._teaching.value, self._terms, strict=True):
            values = loss.per_token(student, lesson, labels)
            values = tf.reduce_sum(tf.math.multiply_no_nan(values, weights))
            mean = tf.math.divide_no_nan(values, count)
            metric.update_state(mean, count)
            total += weight_at(loss.weight, self.optimizer.iterations) * mean
        if self.losses:
            total += tf.add_n(self.losses)
        self._loss_tracker.update_state(total, count)
        return total / replica_count()

    def batch_weight(self, data: Data) -> tf.Tensor:
        """Returns by how much a batch counts beside those of other replicas: its real tokens."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x, _ = split_inputs(x)
        tokens = tf.nest.flatten(x if y is None else y)[0]
        return tf.reduce_sum(token_weights(x, sample_weight, tokens))

    def train_step(self, data: Data) -> Config:
        """Runs teacher and student on a batch, and updates the student."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x, recorded = split_inputs(x)
        lesson = self._lesson(x, recorded)
        with tf.GradientTape() as tape:
            student = self._look(x, training=True)
            weights = token_weights(x, sample_weight, student.logits[..., 0])
            loss = self.optimizer.scale_loss(self._loss(student, lesson, y, weights))
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return self.compute_metrics(x, y, student.logits, sample_weight=weights)

    def test_step(self, data: Data) -> Config:
        """Computes the losses of a batch, without dropout."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x, recorded = split_inputs(x)
        student = self._look(x, training=False)
        weights = token_weights(x, sample_weight, student.logits[..., 0])
        self._loss(student, self._lesson(x, recorded), y, weights)
        return self.compute_metrics(x, y, student.logits, sample_weight=weights)

    def fit(self, x: Data = None, *args: object, **kwargs: object) -> Any:
        """Trains as `keras.Model.fit` does. Text is tokenized by the student's preprocessor.

        Raises:
            ValueError: If a callback saves the whole model, or data was not recorded.
        """
        given = kwargs.get("callbacks")
        for callback in keras.tree.flatten(getattr(given, "callbacks", given)):
            whole = isinstance(callback, keras.callbacks.ModelCheckpoint)
            if whole and not callback.save_weights_only:
                raise ValueError(_NOT_SAVED)
        if kwargs.get("validation_data") is not None:
            kwargs["validation_data"] = self._read(kwargs["validation_data"], kwargs)
        self._record()
        build_optimizer(self)
        return super().fit(self._read(x, kwargs, "batch_size"), *args, **kwargs)

    def _record(self) -> None:
        """Notes on the student that it is taught, once for the same losses.

        A loss that plain data cannot hold, such as one whose weight is a function, is left out.
        """
        losses = tuple(loss for loss in self._teaching.value if is_serializable(loss))
        if losses and all(known.losses != losses for known in Distill.found_on(self.student)):
            record(self.student, Distill(steps=None, losses=losses))

    def evaluate(self, x: Data = None, *args: object, **kwargs: object) -> Any:
        """Evaluates as `keras.Model.evaluate` does. Text is tokenized, as in `fit`."""
        return super().evaluate(self._read(x, kwargs, "batch_size"), *args, **kwargs)

    def predict(self, x: Data = None, batch_size: int | None = None, **kwargs: object) -> Any:
        """Returns the student's logits, as `keras.Model.predict` does. Text is tokenized."""
        if is_text(x):
            x = as_tokens(x, getattr(self.student, "preprocessor", None), batch_size)
            batch_size = None
        return super().predict(x, batch_size=batch_size, **kwargs)

    def _read(self, data: Data, settings: dict[str, Any], consumed: str = "") -> Any:
        if is_text(data):
            size = settings.pop(consumed, None) or settings.get("validation_batch_size")
            data = as_tokens(data, getattr(self.student, "preprocessor", None), size)
        return self.teacher.attach(data) if isinstance(self.teacher, Recording) else data

    def _is_stale(self) -> bool:
        """Returns whether layers of the student were dressed or undressed since the last trace."""
        now: list[Any] = [type(layer) for layer in self.student._flatten_layers()]
        now += [masks.masked(variable) for variable in self.student.variables]
        before, self._traced = self._traced, _Untracked(now)
        return before is not None and before.value != now

    def make_train_function(self, force: bool = False) -> Any:
        """Returns the compiled train step, made anew if the student was dressed differently."""
        stale = self._is_stale()
        if stale:
            make_function(self, "test", super().make_test_function, True)
        return make_function(self, "train", super().make_train_function, force or stale)

    def make_test_function(self, force: bool = False) -> Any:
        """Returns the compiled test step, made anew if the student was dressed differently."""
        stale = self._is_stale()
        if stale:
            make_function(self, "train", super().make_train_function, True)
        return make_function(self, "test", super().make_test_function, force or stale)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Data = None) -> None:
        build_for(self, super()._maybe_symbolic_build, iterator, data_batch)

    def save(self, *args: object, **kwargs: object) -> None:
        """Raises before it touches a file: a distiller is saved as its student.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(_NOT_SAVED)

    def get_config(self) -> Config:
        """Raises: a distiller is saved as its student, and resumed from `save_weights`.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(_NOT_SAVED)


class _Untracked:
    """Holds something that Keras shall not look into."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _names(losses: Sequence[Loss]) -> list[str]:
    """Returns a name for each loss, numbered where several have the same."""
    names = [loss.name for loss in losses]
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique
