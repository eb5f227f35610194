"""Masks that move: what goes, what grows, and that a resumed run moves the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tfgptopt.callbacks import Checkpoint, Pruning

from tfgptopt.model.targets import select
from tfgptopt.pruning import NM, SET, ConstantSparsity, PolynomialDecay, Random, RigL, Threshold
from tfgptopt.pruning.regrowth import moved, share_at
from tfgptopt.recipe import Prune, Recipe

GENERATOR = np.random.default_rng(0)


def test_the_smallest_go_and_the_most_deserving_grow():
    w = GENERATOR.normal(0, 1, (8, 5)).astype(np.float32)
    growth = GENERATOR.random((8, 5)).astype(np.float32)
    mask = GENERATOR.permutation(40).reshape(8, 5) < 20
    w *= mask
    found = moved(np.abs(w), mask, growth, tf.constant(0.6), tf.constant(0.25)).numpy()
    kept = 16  # 40 % of 40, of which a quarter is new.
    order = np.argsort(-np.where(mask, np.abs(w), -1), axis=None)[: kept - 4]
    expected = np.zeros(40, bool)
    expected[order] = True
    candidates = np.where(expected, -1, growth.ravel())
    expected[np.argsort(-candidates)[:4]] = True
    np.testing.assert_array_equal(found.ravel(), expected)


def test_the_share_falls_along_a_half_cosine():
    schedule = ConstantSparsity(0.9, 100, end_step=300, frequency=50)
    shares = [share_at(RigL(0.4), schedule, step) for step in (100, 150, 200, 300)]
    assert shares == pytest.approx([0.4, 0.2 + 0.2 / np.sqrt(2), 0.2, 0.0])
    assert share_at(SET(0.4), ConstantSparsity(0.9, 0), 7) == 0.4


def make_model():
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(24), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    return model


X = GENERATOR.normal(0, 1, (32, 16)).astype(np.float32)


class Watch(keras.callbacks.Callback):
    """Keeps masks, weights and gradients of the first layer at every step."""

    def __init__(self, stop=None):
        super().__init__()
        self.seen, self.stop = [], stop

    def on_train_batch_begin(self, batch, logs=None):
        target = select(self.model)[0]
        mask = target.variable.constraint.mask.numpy()
        x = X[batch * 4 : batch * 4 + 4]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x) - x[:, :10]))
        gradient = tape.gradient(loss, target.variable.value).numpy()
        self.seen.append((mask, target.variable.numpy(), gradient))
        if len(self.seen) == self.stop:
            raise InterruptedError


def fit(model, callbacks, epochs=3):
    model.fit(
        X, X[:, :10], batch_size=4, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks
    )


SCHEDULE = ConstantSparsity(0.8, 0, end_step=20, frequency=6)


@pytest.mark.parametrize("regrow", [RigL(0.5), SET(0.5)])
def test_in_fit_a_mask_moves_by_the_gradients_of_the_step_before(regrow):
    watch = Watch()
    fit(make_model(), [Pruning(SCHEDULE, score=Random(), regrow=regrow), watch])
    masks = [seen[0] for seen in watch.seen]
    assert all(mask.sum() == round(0.2 * 384) for mask in masks)
    moves = [i for i in range(1, 24) if (masks[i] != masks[i - 1]).any()]
    assert moves == [6, 12, 18]
    for step in moves:
        before, weights, gradient = watch.seen[step - 1]
        # Trained on by one step with the mask that was there, which is what was moved.
        trained = np.where(before, weights - 0.05 * gradient, 0)
        share = share_at(regrow, SCHEDULE, step)
        new = masks[step] & ~before
        gone = before & ~masks[step]
        assert new.sum() == gone.sum() > 0
        stays = before & masks[step]
        assert np.abs(trained[gone]).max() <= np.abs(trained[stays]).max()
        if isinstance(regrow, RigL):
            expected = moved(
                np.abs(trained),
                before,
                np.abs(gradient),
                tf.constant(0.8),
                tf.constant(share, tf.float32),
            )
            np.testing.assert_array_equal(masks[step], expected)
        assert not watch.seen[step][1][new].any()  # They begin at zero.


@pytest.mark.parametrize("regrow", [RigL(), SET()])
def test_a_killed_run_moves_the_same(regrow, tmp_path):
    def pruning():
        return Pruning(PolynomialDecay(0.2, 0.8, 0, 20, frequency=3), regrow=regrow)

    whole, resumed = make_model(), make_model()
    fit(whole, [pruning()])
    checkpoint = Checkpoint(tmp_path, save_freq=5)
    with pytest.raises(InterruptedError):
        fit(make_model(), [pruning(), checkpoint, Watch(stop=14)])
    checkpoint.folder.close()
    fit(resumed, [pruning(), Checkpoint(tmp_path, save_freq=5)])
    for one, other in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.mean(resumed.get_weights()[0] == 0) == pytest.approx(0.8, abs=2e-3)


def test_settings():
    recipe = Recipe(
        (
            Prune(SCHEDULE, regrow=RigL(0.2), targets="a"),
            Prune(SCHEDULE, regrow=SET(0.1, 4), targets="b"),
        )
    )
    again = Recipe.from_config(recipe.to_config())
    assert [one.regrow for one in again.techniques] == [RigL(0.2), SET(0.1, 4)]
    for share in (0.0, 1.0, "a"):
        with pytest.raises(ValueError, match="`share`"):
            RigL(share)
    with pytest.raises(ValueError, match="`regrow` must be"):
        Pruning(SCHEDULE, regrow="rigl")
    model = make_model()
    for pruning in (
        Pruning(ConstantSparsity(0.5, 0), NM(2, 4), regrow=RigL()),
        Pruning(Threshold(0.1), regrow=RigL()),
    ):
        with pytest.raises(ValueError, match="moves connections one by one"):
            fit(model, [pruning])
    assert select(model)[0].variable.constraint is None
