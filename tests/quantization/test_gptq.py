import numpy as np
import pytest
import tensorflow as tf

from tfgptopt.quantization import rounding
from tfgptopt.quantization.gptq import gptq


def greedy(column, hessian, scale, kept, limit=7):
    """Optimal brain quantization of one column by its definition, in the order of the inputs.

    After each input is rounded, the free ones solve their least-squares problem anew.
    """
    weights = column.astype(np.float64).copy()
    order = np.argsort(-np.diag(hessian), kind="stable")
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    for i, at in enumerate(order):
        rounded = np.clip(np.rint(weights[at] / scale[at]), -limit, limit) * scale[at] * kept[at]
        free = order[i + 1 :]
        change = np.linalg.solve(
            damped[np.ix_(free, free)], damped[np.ix_(free, [at])]
        ) * (weights[at] - rounded)  # fmt: skip
        weights[free] += change[:, 0]
        weights[at] = rounded
    return weights


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("pruned", [False, True])
def test_it_is_optimal_brain_quantization_in_order(block, pruned):
    generator = np.random.default_rng(0)
    matrix = generator.normal(0, 1, (64, 3)).astype(np.float32)
    rows = generator.normal(0, 1, (500, 64)) @ generator.normal(0, 1, (64, 64))
    gram = rows.T @ rows
    kept = generator.random((64, 3)) > 0.5 if pruned else np.ones((64, 3), bool)
    matrix *= kept
    rounded, scale = gptq(matrix, gram.copy(), 4, block, kept if pruned else None, rounds=0)
    by_input = np.repeat(scale.reshape(-1, 3), block or 64, 0)
    for j in range(3):
        expected = greedy(matrix[:, j], gram, by_input[:, j], kept[:, j])
        np.testing.assert_allclose(rounded[:, j], expected, atol=1e-5)
    assert (rounded[~kept] == 0).all()


def improved(column, rounded, scale, hessian, kept, grid):
    """One round for one column by its definition: every try computes the whole error."""
    size = len(column) // len(scale)
    scale, integers = scale.copy(), np.rint(rounded / np.repeat(scale, size))
    factor = np.linalg.cholesky(hessian).T

    def error(integers, scale):
        return np.square(factor @ (integers * np.repeat(scale, size) - column)).sum()

    for i in range(len(scale)):
        block = slice(i * size, (i + 1) * size)
        left = column - integers * np.repeat(scale, size)
        left[block] = column[block]
        basis = factor[:, block] @ integers[block]
        best = np.linalg.lstsq(basis[:, np.newaxis], factor @ left, rcond=None)[0][0]
        scale[i] = grid.representable(tf.constant([best], tf.float32)).numpy()[0]
    for i in [*range(len(column))] * 2:
        tries = [np.where(np.arange(len(column)) == i, k * kept[i], integers) for k in range(-7, 8)]
        integers = min(tries, key=lambda integers: error(integers, scale))
    return integers * np.repeat(scale, size)


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("pruned", [False, True])
def test_scales_are_fitted_and_integers_chosen_again(block, pruned):
    generator = np.random.default_rng(2)
    matrix = generator.normal(0, 1, (64, 3)).astype(np.float32)
    rows = generator.normal(0, 1, (500, 64)) @ generator.normal(0, 1, (64, 64))
    gram = rows.T @ rows
    kept = generator.random((64, 3)) > 0.5 if pruned else np.ones((64, 3), bool)
    matrix *= kept
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(64)
    before, scale = gptq(matrix, gram.copy(), 4, block, kept, rounds=0)
    found, _ = gptq(matrix, gram.copy(), 4, block, kept, rounds=1)
    grid = rounding.Grid(4, (0,), block)
    for j in range(3):
        of_column = scale.reshape(-1, 3)[:, j].astype(np.float64)
        expected = improved(matrix[:, j], before[:, j], of_column, damped, kept[:, j], grid)
        np.testing.assert_allclose(found[:, j], expected, atol=1e-5)
    assert (found[~kept] == 0).all()


def test_more_rounds_make_no_error_larger():
    generator = np.random.default_rng(3)
    matrix = generator.normal(0, 1, (300, 8)).astype(np.float32)
    rows = generator.normal(0, 1, (900, 300)) @ generator.normal(0, 1, (300, 300))
    gram = rows.T @ rows
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(300)
    changes = [gptq(matrix, gram.copy(), 4, rounds=n)[0] - matrix for n in (0, 1, 3)]
    errors = [np.einsum("io,io->o", damped @ one, one) for one in changes]
    assert (errors[1] < errors[0]).all() and (errors[2] <= errors[1] * (1 + 1e-6)).all()


def test_outputs_are_nearer_than_with_rounding_to_nearest():
    generator = np.random.default_rng(1)
    matrix = generator.normal(0, 1, (64, 16)).astype(np.float32)
    rows = (generator.normal(0, 1, (500, 64)) @ generator.normal(0, 1, (64, 64))).astype(np.float32)
    rounded, _ = gptq(matrix, (rows.T @ rows).astype(np.float64), 4)
    nearest = rounding.fake_quantize(tf.constant(matrix), rounding.Grid(4, (0,))).numpy()
    error = np.square(rows @ rounded - rows @ matrix).sum()
    assert error < 0.6 * np.square(rows @ nearest - rows @ matrix).sum()


def test_an_input_that_is_always_zero_is_no_trouble():
    matrix = np.random.default_rng(0).normal(0, 1, (32, 2)).astype(np.float32)
    gram = np.eye(32)
    gram[3, 3] = 0
    rounded, _ = gptq(matrix, gram, 8)
    assert np.isfinite(rounded).all()
