import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch

from tfgptopt.training import find_batch_size, find_learning_rate


def lines(slope=2.0):
    """Returns a straight line to learn, and what learns it: SGD diverges above a rate of 1."""
    x = np.random.default_rng(0).choice([-1.0, 1.0], size=(64, 1))
    data = tf.data.Dataset.from_tensor_slices((x, slope * x)).shuffle(64, seed=0).batch(16)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.123, momentum=0.5), "mse")
    return model, data


def test_the_range_test_stays_below_what_diverges(tmp_path):
    model, data = lines()
    model.fit(data, verbose=0)
    before = model.get_weights(), [v.numpy() for v in model.optimizer.variables]
    optimizer = model.optimizer
    found = find_learning_rate(model, data, lowest=1e-4, highest=100.0, steps=60)
    assert found.rates[0] == pytest.approx(1e-4) and np.all(np.diff(found.rates) > 0)
    # Momentum 0.5 is stable below a rate of 1.5 on this loss, whose curvature is 2.
    assert found.rose and found.rates[-1] < 100.0
    assert 0.01 < found.suggestion < 1.5
    assert f"{found.suggestion:.1e}" in found.describe()
    assert model.optimizer is optimizer
    for old, new in zip(before[0], model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(before[1], model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(old, new.numpy())
    found.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    # `fit` goes on with its own optimizer.
    twin, _ = lines()
    twin.set_weights(before[0])
    for variable, value in zip(twin.optimizer.variables, before[1], strict=False):
        variable.assign(value)
    model.fit(data, verbose=0)
    assert int(model.optimizer.iterations) == 8


def test_a_range_that_is_too_low_says_so():
    model, data = lines()
    found = find_learning_rate(model, data, lowest=1e-5, highest=1e-2, steps=20)
    assert not found.rose and "try higher ones" in found.describe()


def test_bad_ranges():
    model, data = lines()
    with pytest.raises(ValueError, match="`lowest` must be above 0"):
        find_learning_rate(model, data, lowest=1.0, highest=0.1)
    with pytest.raises(ValueError, match="`steps` at least 20"):
        find_learning_rate(model, data, steps=5)
    broken = data.map(lambda x, y: (x, y * np.nan))
    with pytest.raises(ValueError, match="not finite at a learning rate"):
        find_learning_rate(model, broken)


def test_batch_sizes_are_measured_in_a_child():
    model = make_gpt()
    model.compile("adamw", weighted_metrics=[])
    before = model.get_weights()
    data = tf.data.Dataset.from_tensor_slices(random_batch()).batch(4)
    found = find_batch_size(model, data, sizes=(1, 16), steps=3)
    assert [trial.batch_size for trial in found.trials] == [1, 16] and found.failed is None
    slow, fast = (trial.tokens_per_second for trial in found.trials)
    assert fast > 2 * slow > 0 and found.suggestion == found.global_suggestion == 16
    assert all(2**27 < trial.peak_bytes < 2**34 for trial in found.trials)
    assert "16" in found.describe() and "<- suggestion" in found.describe()
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(ValueError, match="must be ints of 1 or more, rising"):
        find_batch_size(model, data, sizes=(4, 2))
