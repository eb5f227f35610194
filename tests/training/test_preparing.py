"""The step of a prepared model takes the step that Keras takes with the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import two_replicas
from tfgptopt.callbacks import Pruning

from tfgptopt.pruning import ConstantSparsity
from tfgptopt.training import prepare

ROWS = 21  # Neither replicas nor parts divide it.


def data(batch=8):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 6)).astype("float32")
    y, weights = generator.normal(size=(ROWS, 2)), generator.uniform(size=ROWS)
    return tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(batch)


def fitted(
    strategy=None,
    accumulate=None,
    callbacks=(),
    batch=8,
    optimizer=None,
    rows=None,
    epochs=3,
    validate=False,
    **settings,
):
    """Returns a small model that was trained, and what `fit` returned."""
    batches = data(batch) if rows is None else rows.batch(batch, drop_remainder=True)
    keras.utils.set_random_seed(4)
    with (strategy or tf.distribute.get_strategy()).scope():
        layers = [keras.layers.Dense(8, "tanh", name="wide"), keras.layers.Dense(2, name="out")]
        model = keras.Sequential([keras.Input((6,)), *layers])
        optimizer = optimizer or keras.optimizers.AdamW(
            0.05, weight_decay=0.1, global_clipnorm=0.02
        )
        model.compile(optimizer, "mse", weighted_metrics=["mae"], **settings)
        if accumulate is not None:
            prepare(model, accumulate)
    held_out = batches if validate else None
    history = model.fit(
        batches, epochs=epochs, verbose=0, validation_data=held_out, callbacks=callbacks
    )
    return model, history.history


@pytest.fixture(scope="module")
def plain():
    """What Keras gives by itself on one device."""
    return fitted(validate=True)


@pytest.mark.parametrize(
    ("strategy", "accumulate", "settings"),
    [
        (None, 3, {}),
        (None, 2, {"steps_per_execution": 2}),
        (None, 3, {"run_eagerly": True}),
        (two_replicas, 1, {"steps_per_execution": 2}),
        (two_replicas, 3, {}),
    ],
)
def test_the_step_is_that_of_the_whole_batch(plain, strategy, accumulate, settings):
    model, history = fitted(strategy and strategy(), accumulate, validate=True, **settings)
    assert history.keys() == plain[1].keys()
    for name, values in history.items():
        np.testing.assert_allclose(values, plain[1][name], rtol=2e-5, err_msg=name)
    for ours, theirs in zip(model.get_weights(), plain[0].get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # Updates are counted, not parts.
    assert int(model.optimizer.iterations.numpy()) == 9


@pytest.mark.parametrize(("strategy", "accumulate"), [(None, 2), (two_replicas, 1)])
def test_steps_compiled_by_xla(strategy, accumulate):
    # XLA needs parts of one size. Of data whose end is not known, Keras would count a step more.
    rows = data().unbatch().take(20).apply(tf.data.experimental.assert_cardinality(20))
    settings = {"rows": rows, "batch": 20, "epochs": 2, "validate": True}
    expected = fitted(**settings)
    model, history = fitted(strategy and strategy(), accumulate, jit_compile=True, **settings)
    for name, values in history.items():
        np.testing.assert_allclose(values, expected[1][name], rtol=2e-5, err_msg=name)
    for ours, theirs in zip(model.get_weights(), expected[0].get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_masks_hold_in_updates_of_several_parts():
    schedule = ConstantSparsity(0.5, 0, frequency=1)
    model, _ = fitted(two_replicas(), 2, [Pruning(schedule, targets="wide")])
    kernel = model.get_layer("wide").kernel
    mask = kernel.constraint.mask.numpy()
    assert mask.mean() == 0.5 and not kernel.numpy()[~mask].any()
    assert kernel.numpy()[mask].all()


def test_callbacks_prepare_replicas_by_themselves(plain):
    """Keras alone would clip the gradients of each replica, which moves weights by 1e-3 more."""
    kept = Pruning(ConstantSparsity(0.5, 1000), targets="wide")
    model, _ = fitted(two_replicas(), None, [kept])
    for ours, theirs in zip(model.get_weights(), plain[0].get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_loss_scaling_looks_at_all_replicas():
    inner = keras.optimizers.SGD(0.05)
    expected = fitted(optimizer=inner)[0]
    with two_replicas().scope():
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05))
    strategy = scaled.inner_optimizer._distribution_strategy
    model = fitted(strategy, 1, optimizer=scaled)[0]
    for ours, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="`accumulate` must be an int >= 1"):
        fitted(accumulate=0)
    with pytest.raises(ValueError, match="A batch of 1 rows cannot be spread over 2 replicas"):
        fitted(two_replicas(), 1, batch=1)
    rows = data().unbatch().take(20)
    with pytest.raises(ValueError, match="divide into accumulate=3 parts of one size"):
        fitted(None, 3, batch=20, rows=rows, jit_compile=True)
    strategy = two_replicas()
    with strategy.scope():
        keras_own = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"prepare\(model, accumulate=2\)"):
        fitted(strategy, 1, optimizer=keras_own)
