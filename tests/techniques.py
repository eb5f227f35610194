"""Techniques together, trained for 50 steps: what tests on replicas and on workers share."""

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.distillation import HardLabels, LogitsKL, record
from tfgptopt.model.targets import select
from tfgptopt.pruning import Movement, PolynomialDecay, Wanda
from tfgptopt.quantization import Int8, quantizers
from tfgptopt.training import prepare

ROWS, BATCH, EPOCHS, LENGTH, VOCABULARY = 80, 8, 5, 16, 300


class Losses(keras.callbacks.Callback):
    """Keeps the loss of each batch, not the mean since the epoch began."""

    def __init__(self):
        super().__init__()
        self.values = []
        self._tokens = [float(batch[2].sum()) for batch in batches().as_numpy_iterator()]

    def on_train_batch_end(self, batch, logs=None):
        total = float(logs["loss"]) * sum(self._tokens[: batch + 1])
        before = total if batch == 0 else total - self._before
        self._before = total
        self.values.append(before / self._tokens[batch])


def batches():
    """Returns windows of random tokens, most of them padded, in the same order each time."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (ROWS, LENGTH + 1), np.int32)
    mask = (np.arange(LENGTH) < generator.integers(4, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": mask}
    rows = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:], mask.astype(np.float32)))
    return rows.batch(BATCH, drop_remainder=True)


def make():
    """Returns a GPT-2 of one layer."""
    backbone = keras_hub.models.GPT2Backbone(
        VOCABULARY, 1, 2, 32, 64, dropout=0.0, max_sequence_length=LENGTH
    )
    return keras_hub.models.GPT2CausalLM(backbone)


SCHEDULE = PolynomialDecay(0.0, 0.5, 5, 35, frequency=10)
CALLBACKS = {
    "self": lambda: [
        Pruning(SCHEDULE, targets="attention"),
        Pruning(SCHEDULE, score=Movement(), targets="feedforward"),
    ],
    "recorded": lambda: [
        Pruning(SCHEDULE, score=Wanda(batches().take(2))),
        QuantizationAwareTraining(Int8(scale="mse"), "attention|feedforward", freeze_step=20),
        QuantizationAwareTraining(Int8(scale="learned"), "token_embedding"),
    ],
}


def taught(name, student, folder):
    """Returns a distiller of a student by itself, or by a teacher that was recorded."""
    teacher = "self"
    if name == "recorded":
        model = make()
        model.set_weights([weight * 1.5 for weight in model.get_weights()])
        teacher = record(model, batches(), folder / "recording", top_k=8)
    return tfgptopt.Distiller(student, teacher, [LogitsKL(), HardLabels(0.5)])


def train(name, strategy, folder):
    """Trains for 50 steps, and returns the student with the loss of each step."""
    keras.utils.set_random_seed(1)
    with strategy.scope():
        student = make()
        model = taught(name, student, folder)
        # Of this size, the norm is clipped in every step.
        optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.05, global_clipnorm=0.3)
        model.compile(optimizer=optimizer, weighted_metrics=[])
        prepare(model)
    losses = Losses()
    model.fit(batches(), epochs=EPOCHS, verbose=0, callbacks=[*CALLBACKS[name](), losses])
    return student, losses.values


def copies(variable):
    """Returns what each replica of this process holds of a variable."""
    value = variable._value
    return [copy.numpy() for copy in getattr(value, "values", [value])]


def state(model):
    """Returns weights, masks and scales of a model: for each, the copies of all replicas."""
    found = [copies(target.variable) for target in select(model)]
    for target in select(model):
        mask = getattr(target.variable.constraint, "mask", None)
        if mask is not None:
            found.append(copies(mask))
        for quantizer in quantizers.quantizers_of(target.layer):
            if quantizer.kept is not None:
                found.append(copies(quantizer.kept))
    return found
