"""Every technique, trained for 50 steps in a strategy: what tests on replicas and workers share."""

import keras
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

    def on_train_batch_end(self, batch, logs=None):
        before = sum(self.values[len(self.values) - batch :])
        self.values.append(float(logs["loss"]) * (batch + 1) - before)


def batches(batch=BATCH):
    """Returns windows of random tokens, some of them padded, in the same order each time."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (ROWS, LENGTH + 1), np.int32)
    mask = (np.arange(LENGTH) < generator.integers(4, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": mask}
    rows = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:], mask.astype(np.float32)))
    return rows.batch(batch, drop_remainder=True)


def callbacks(name):
    """Returns the callbacks of a technique."""
    schedule = PolynomialDecay(0.0, 0.5, 5, 35, frequency=10)
    return {
        "magnitude": lambda: [Pruning(schedule), QuantizationAwareTraining(Int8())],
        "wanda": lambda: [Pruning(schedule, score=Wanda(batches().take(2)))],
        "movement": lambda: [Pruning(schedule, score=Movement())],
        "learned": lambda: [QuantizationAwareTraining(Int8(scale="learned"))],
        "frozen": lambda: [QuantizationAwareTraining(Int8(scale="mse"), freeze_step=20)],
    }.get(name, list)()


CALLBACKS = ("magnitude", "wanda", "movement", "learned", "frozen")
TEACHERS = ("live", "self", "recorded")


def taught(name, student, make, folder):
    """Returns a distiller of a student by a teacher that runs, is recorded, or is itself."""
    teacher = "self"
    if name != "self":
        teacher = make()
        teacher.set_weights([weight * 1.5 for weight in teacher.get_weights()])
    if name == "recorded":
        teacher = record(teacher, batches(), folder / "recording", top_k=8)
    return tfgptopt.Distiller(student, teacher, [LogitsKL(), HardLabels(0.5)])


def train(name, strategy, make, folder=None, rate=3e-3, **settings):
    """Trains for 50 steps, and returns the model with the loss of each step."""
    keras.utils.set_random_seed(1)
    with strategy.scope():
        student = model = make()
        if name in TEACHERS:
            model = taught(name, student, make, folder)
        accumulate = settings.pop("accumulate", 1)
        optimizer = keras.optimizers.AdamW(rate, weight_decay=0.05, global_clipnorm=0.3)
        model.compile(optimizer=optimizer, weighted_metrics=[], **settings)
        prepare(model, accumulate)
    losses = Losses()
    model.fit(batches(), epochs=EPOCHS, verbose=0, callbacks=[*callbacks(name), losses])
    return student, losses.values


def copies(variable):
    """Returns what each replica of this process holds of a variable."""
    value = variable._value
    return [copy.numpy() for copy in getattr(value, "values", [value])]


def state(model):
    """Returns the weights, masks and scales of a model on each replica, one list a variable."""
    found = [copies(target.variable) for target in select(model)]
    for target in select(model):
        mask = getattr(target.variable.constraint, "mask", None)
        if mask is not None:
            found.append(copies(mask))
        for quantizer in quantizers.quantizers_of(target.layer):
            if quantizer.kept is not None:
                found.append(copies(quantizer.kept))
    return found
