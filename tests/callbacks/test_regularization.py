"""Penalties in the compiled step, and the sparsity that they bring."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch, two_replicas
from tfgptopt.callbacks import Pruning, Regularization, from_recipe

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import NM, Block, Columns, GroupLasso, Rows, Threshold, Unstructured, report
from tfgptopt.recipe import Recipe, Regularize

W = np.random.default_rng(0).normal(0, 1, (7, 10)).astype(np.float32)


def lasso_in_numpy(w, rows, columns):
    total = 0.0
    for i in range(0, w.shape[0], rows):
        for j in range(0, w.shape[1], columns):
            block = w[i : i + rows, j : j + columns]
            total += np.sqrt(block.size) * np.linalg.norm(block)
    return total


def nm_in_numpy(w, n, m):
    """What lies outside of the n largest of each m inputs."""
    total = 0.0
    for i in range(0, w.shape[0], m):
        total += np.sort(np.abs(w[i : i + m]), axis=0)[::-1][n:].sum()
    return total


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Rows(), lasso_in_numpy(W, 1, 10)),
        (Columns(), lasso_in_numpy(W, 7, 1)),
        (Block(4, 3), lasso_in_numpy(W, 4, 3)),
        (Block(2, 1, norm="l2"), lasso_in_numpy(W, 2, 1)),
        (NM(2, 4), nm_in_numpy(W, 2, 4)),
        (NM(1, 3, axis="output"), nm_in_numpy(W.T, 1, 3)),
    ],
    ids=str,
)
def test_the_penalty_is_the_formula(pattern, expected):
    penalty = GroupLasso(0.5, pattern)
    assert float(penalty(W)) == pytest.approx(0.5 * expected, rel=1e-5)
    x = tf.Variable(np.where(np.arange(7)[:, None] < 4, W, 0))  # Groups of zeros have no slope.
    with tf.GradientTape() as tape:
        cost = penalty(x)
    assert np.isfinite(tape.gradient(cost, x)).all()


def dense(units=8, **options):
    keras.utils.set_random_seed(3)
    layer = keras.layers.Dense(units, **options)
    model = keras.Sequential([keras.Input((16,)), layer])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    return model, layer


X = np.random.default_rng(1).normal(0, 1, (32, 16)).astype(np.float32)
NOISE = np.random.default_rng(2).normal(0, 0.5, (32, 8)).astype(np.float32)
Y = X[:, :8] + NOISE


def fit(model, *callbacks, epochs=1, times=1):
    x, y = np.tile(X, (times, 1)), np.tile(Y, (times, 1))
    options = {"batch_size": 8, "epochs": epochs, "verbose": 0, "shuffle": False}
    return model.fit(x, y, callbacks=list(callbacks), **options).history


@pytest.mark.parametrize("penalty", [keras.regularizers.L1(0.01), keras.regularizers.L2(0.03)])
def test_it_trains_as_a_layer_with_the_regularizer_of_keras_and_only_while_it_is_there(penalty):
    model, layer = dense()
    reference, other = dense(kernel_regularizer=penalty)
    regularization = Regularization(penalty)
    history, expected = fit(model, regularization), fit(reference)
    np.testing.assert_allclose(layer.kernel, other.kernel, atol=1e-6)
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert history["penalty"][-1] == pytest.approx(float(penalty(layer.kernel.numpy())), rel=1e-5)
    step = model.train_function
    plain, third = dense()
    third.kernel.assign(layer.kernel.numpy())
    third.bias.assign(layer.bias.numpy())
    fit(model)
    fit(plain)
    np.testing.assert_allclose(layer.kernel, third.kernel, atol=1e-6)
    fit(model, regularization)
    assert model.train_function is step  # Switched, not traced again.
    tfgptopt.finalize(model)
    assert layer.kernel.regularizer is None


def test_a_penalty_adds_to_one_that_is_there():
    model, layer = dense(kernel_regularizer=keras.regularizers.L2(0.02))
    reference, other = dense(kernel_regularizer=keras.regularizers.L1L2(0.01, 0.02))
    fit(model, Regularization(keras.regularizers.L1(0.01)))
    fit(reference)
    np.testing.assert_allclose(layer.kernel, other.kernel, atol=1e-6)


def test_rows_that_a_penalty_makes_small_are_pruned_by_a_threshold():
    """Half of the inputs tell nothing of the labels: their rows vanish, and no others."""
    model, layer = dense()
    threshold = Threshold(0.1, relative_to="rms", begin_step=500, end_step=560, frequency=10)
    callbacks = [Regularization(GroupLasso(0.04, Rows())), Pruning(threshold, Rows(norm="l2"))]
    history = fit(model, *callbacks, epochs=10, times=15)
    assert history["near_zero"][0] < 0.2 and history["near_zero"][-1] == 0.5
    assert history["sparsity"][-1] == 0.5
    np.testing.assert_array_equal(layer.kernel.numpy().any(axis=1), np.arange(16) < 8)
    assert report(model).sparsity == 0.5
    # Without it, none does.
    model, layer = dense()
    fit(model, Pruning(threshold, Rows(norm="l2")), epochs=10, times=15)
    assert layer.kernel.numpy().all()


def test_in_a_distiller_and_on_two_replicas():
    weights = []
    for strategy in (tf.distribute.get_strategy(), two_replicas()):
        with strategy.scope():
            keras.utils.set_random_seed(1)
            student, teacher = make_gpt(layers=1), make_gpt(layers=1)
            distiller = tfgptopt.Distiller(student, teacher)
            distiller.compile(optimizer=keras.optimizers.SGD(0.1))
        callback = Regularization(GroupLasso(1e-2, NM(2, 4)), targets="feedforward")
        history = distiller.fit(
            random_batch(8)[0], batch_size=4, verbose=0, shuffle=False, callbacks=[callback]
        ).history
        assert history["loss"][-1] > history["penalty"][-1] * 0.9 > 0
        chosen = select(student, "feedforward")
        weights.append([keras.ops.convert_to_numpy(t.variable) for t in chosen])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_recipe_names_it():
    recipe = Recipe(
        (Regularize(keras.regularizers.L1(1e-3)), Regularize(GroupLasso(1e-3, NM(2, 4)), "x"))
    )
    again = Recipe.from_config(recipe.to_config())
    assert again.to_config() == recipe.to_config()
    one, other = from_recipe(again)
    assert float(one.technique.penalty(W)) == pytest.approx(1e-3 * np.abs(W).sum(), rel=1e-5)
    assert other.technique.penalty.pattern == NM(2, 4) and other.technique.targets == "x"


def test_what_is_wrong_is_said_before_anything_changes():
    for wrong, match in (
        (lambda: GroupLasso(0, Rows()), "`strength`"),
        (lambda: GroupLasso(1e-3, Unstructured()), "regularizers.L1"),
        (lambda: Regularization(keras.regularizers.L1), "`penalty` must be"),
        (lambda: Regularization(keras.regularizers.L1(1e-3), log_freq=0), "`log_freq`"),
        (lambda: Regularize.from_config({"penalty": {"name": "l7"}}), "one of l1, l2"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
    model, layer = dense()
    before = layer.kernel.numpy()
    with pytest.raises(ValueError, match="does not fit into"):
        fit(model, Regularization(GroupLasso(1e-3, Block(32, 1))))
    two = [Regularization(keras.regularizers.L1(1e-3)) for _ in range(2)]
    with pytest.raises(ValueError, match="Two Regularization callbacks"):
        fit(model, *two)
    np.testing.assert_array_equal(layer.kernel, before)
    assert layer.kernel.regularizer is None
