import keras
import numpy as np
import pytest
import tensorflow as tf
from tfgptopt.callbacks import Pruning

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import Movement, PolynomialDecay, PruningSchedule, report

SCHEDULE = PolynomialDecay(0.0, 0.6, 2, 30, frequency=4)


def make_model(seed=7, **options):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(16)])
    model.compile(optimizer=keras.optimizers.Adam(1e-2, **options), loss="mse")
    return model


def fit(model, callbacks, epochs=1, **options):
    x = np.random.default_rng(0).normal(0, 1, (32, 16)).astype(np.float32)
    model.fit(
        x, x, batch_size=4, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks, **options
    )


def masked_weights(model):
    """Returns what should be zero."""
    kernels = [(t.variable, t.variable.constraint.mask.numpy()) for t in select(model)]
    return np.concatenate([kernel.numpy()[~mask] for kernel, mask in kernels])


class Failing(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        raise RuntimeError("no disk")


@pytest.mark.parametrize("score", [tfgptopt.pruning.Magnitude(), Movement()], ids=type)
def test_a_callback_that_fails_at_the_start_leaves_no_masks(score):
    model = make_model()
    before = model.get_weights()
    with pytest.raises(RuntimeError, match="no disk"):
        fit(model, [Pruning(SCHEDULE, score=score), Failing()])
    assert all(t.variable.constraint is None for t in select(model))
    assert "update_step" not in vars(model.optimizer)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_dense_checkpoint_is_pruned_by_the_masks_that_hold(tmp_path):
    dense = make_model(seed=8)
    dense.save_weights(tmp_path / "dense.weights.h5")
    model = make_model()
    tfgptopt.prune(model, 0.5)
    model.load_weights(tmp_path / "dense.weights.h5")
    assert report(model).sparsity == 0.5
    for target, loaded in zip(select(model), select(dense), strict=True):
        mask = target.variable.constraint.mask.numpy()
        np.testing.assert_array_equal(target.variable, loaded.variable * mask)


def test_masks_of_a_checkpoint_come_before_those_that_hold(tmp_path):
    other = make_model(seed=8)
    tfgptopt.prune(other, 0.25)
    other.save_weights(tmp_path / "other.weights.h5")
    model = make_model()
    tfgptopt.prune(model, 0.5)
    model.load_weights(tmp_path / "other.weights.h5")
    for target, loaded in zip(select(model), select(other), strict=True):
        np.testing.assert_array_equal(target.variable, loaded.variable)
        np.testing.assert_array_equal(
            target.variable.constraint.mask, loaded.variable.constraint.mask
        )


def test_lora_is_refused_while_masks_hold_and_works_on_zeros():
    model = make_model()
    tfgptopt.prune(model, 0.5)
    layer = model.layers[0]
    with pytest.raises(ValueError, match=r"kernel is being pruned.*finalize\(model\)` before"):
        layer.enable_lora(2)
    assert not layer.lora_enabled
    tfgptopt.finalize(model)
    zeros = layer.kernel.numpy() == 0
    layer.enable_lora(2)
    model.compile(optimizer="adam", loss="mse")
    fit(model, [])
    np.testing.assert_array_equal(layer._kernel.numpy() == 0, zeros)
    assert layer.lora_kernel_b.numpy().any()


class Stairs(PruningSchedule):
    """Fires each 5th step with 0.1 more, up to what is no sparsity."""

    def __init__(self, top=1.0):
        self.top = top

    def __call__(self, step):
        height = 0.1 * tf.cast(step // 5, tf.float32)
        return tf.equal(step % 5, 0), tf.where(height >= 0.45, self.top, height)

    def get_config(self):
        return {"top": self.top}


@pytest.mark.parametrize("top", [1.0, -0.1, float("nan")])
def test_a_schedule_is_checked_up_to_the_last_step_before_training(top):
    model = make_model()
    fit(model, [Pruning(Stairs(top))], epochs=3)  # Steps 0 to 23.
    assert report(model).sparsity == pytest.approx(0.4, abs=1e-2)
    fresh = make_model()
    before = fresh.get_weights()
    with pytest.raises(ValueError, match=rf"Stairs gives sparsity {top}.* at step 25"):
        fit(fresh, [Pruning(Stairs(top))], epochs=4)
    pruning = Pruning(Stairs(top))
    pruning.set_model(fresh)
    with pytest.raises(ValueError, match="at step 25"):
        pruning.step()
    assert all(t.variable.constraint is None for t in select(fresh))
    for ours, theirs in zip(fresh.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


class Seen(keras.callbacks.Callback):
    """Looks at masked weights whenever a model is evaluated or an epoch ends."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_test_batch_end(self, batch, logs=None):
        self.values.append(masked_weights(self.model))

    on_epoch_end = on_test_batch_end


@pytest.mark.parametrize("compiled_again", [False, True])
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_averages_are_held_where_keras_swaps_them_in(swap_on_epoch, compiled_again):
    model = make_model(use_ema=True, ema_momentum=0.5)
    data = np.ones((8, 16), np.float32)
    seen = Seen()
    pruning = Pruning(PolynomialDecay(0.0, 0.5, 0, 12, frequency=4))
    validated = {"validation_data": (data, data)} if not swap_on_epoch else {}
    swap = keras.callbacks.SwapEMAWeights
    fit(model, [pruning, swap(swap_on_epoch), seen], epochs=2, **validated)
    if compiled_again:
        model.compile(
            optimizer=keras.optimizers.SGD(1e-2, use_ema=True, ema_momentum=0.5), loss="mse"
        )
        fit(model, [swap(swap_on_epoch), seen], **validated)
    assert len(seen.values) >= 2
    assert not np.concatenate(seen.values).any()
    assert len(seen.values[-1]) == 512
    assert not masked_weights(model).any()


def test_scores_that_were_not_loaded_are_missed(tmp_path):
    model = make_model()
    pruning = Pruning(SCHEDULE, score=Movement())
    fit(model, [pruning], epochs=2)
    expected = pruning._pruner.meter.variables(0)[0].numpy()
    model.save_weights(tmp_path / "c.weights.h5")
    again = make_model()
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "c.weights.h5")
    with pytest.warns(UserWarning, match="none of the scores that were gathered"):
        fit(again, [Pruning(SCHEDULE, score=Movement())], epochs=2)
    for dress in (
        lambda model, pruning: pruning.set_model(model),
        lambda model, pruning: tfgptopt.Recipe(
            (tfgptopt.recipe.Prune(SCHEDULE, score=Movement()),)
        ).replay(model),
    ):
        again, pruning = make_model(), Pruning(SCHEDULE, score=Movement())
        again.optimizer.build(again.trainable_variables)
        dress(again, pruning)
        again.load_weights(tmp_path / "c.weights.h5")
        pruning.set_model(again)
        pruning.step()
        np.testing.assert_array_equal(pruning._pruner.meter.variables(0)[0].numpy(), expected)
