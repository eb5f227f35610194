"""A training of several workers with dropout, a mask and checkpoints, which may be killed."""

import os
import signal

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from tfgptopt.callbacks import Checkpoint, Pruning

from tfgptopt.pruning import PolynomialDecay
from tfgptopt.training import prepare

EPOCHS, STEPS, BATCH, LENGTH, VOCABULARY = 3, 10, 4, 8, 50


class Killer(keras.callbacks.Callback):
    """Sends its process a signal behind a step, and counts steps."""

    def __init__(self, step, number):
        super().__init__()
        self.steps, self.step, self.number = 0, step, number

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == self.step:
            os.kill(os.getpid(), self.number)


def run(chosen, checkpoints, result, step=0, number=signal.SIGKILL):
    """Trains, and writes weights, the optimizer, losses and the number of steps."""
    keras.utils.set_random_seed(1)
    with chosen.scope():
        backbone = keras_hub.models.GPT2Backbone(
            VOCABULARY, 1, 2, 16, 32, dropout=0.2, max_sequence_length=LENGTH
        )
        model = keras_hub.models.GPT2CausalLM(backbone)
        model.compile(optimizer=keras.optimizers.AdamW(1e-3), weighted_metrics=[])
        prepare(model)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (STEPS * BATCH, LENGTH + 1), np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((len(tokens), LENGTH), np.int32)}
    data = tf.data.Dataset.from_tensor_slices((inputs, tokens[:, 1:]))
    data = data.shuffle(len(tokens), seed=3).batch(BATCH)
    killer = Killer(step, number)
    pruning = Pruning(PolynomialDecay(0.0, 0.5, 2, 20, frequency=5))
    callbacks = [pruning, Checkpoint(checkpoints, save_freq=4), killer]
    history = model.fit(data, epochs=EPOCHS, verbose=0, callbacks=callbacks).history
    state = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    np.savez(result, *state, loss=history["loss"], steps=killer.steps)
