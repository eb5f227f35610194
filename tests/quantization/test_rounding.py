import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfgptopt.decoder import Matrix
from tfgptopt.exporting.tflite import operators as op
from tfgptopt.exporting.tflite.builder import Model
from tfgptopt.quantization import rounding
from tfgptopt.quantization.rounding import Grid
from tfgptopt.quantization.row_rounding import fake_quantize_rows

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)
bit_widths = st.sampled_from([4, 8])


def numpy_scale(weights: np.ndarray, bits: int) -> np.ndarray:
    """Absmax over columns divided by the largest integer, kept to 16 significant bits."""
    limit = np.float32(2 ** (bits - 1) - 1)
    exact = np.abs(weights).max(axis=1, keepdims=True) / limit
    mantissa, exponent = np.frexp(exact.astype(np.float64))
    rounded = np.ldexp(np.floor(mantissa * 2.0**16 + 0.5) / 2.0**16, exponent)
    return np.where(rounded < 2.0**-100, 1.0, rounded).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(matrices, bit_widths)
def test_integers_and_scale_are_the_formula(weights, bits):
    integers, scale = (x.numpy() for x in rounding.quantize(weights, Grid(bits, (1,))))
    np.testing.assert_array_equal(scale, numpy_scale(weights, bits))
    limit = 2 ** (bits - 1) - 1
    expected = np.clip(np.round(weights / scale), -limit, limit)
    np.testing.assert_array_equal(integers, expected)


@settings(deadline=None, max_examples=30)
@given(matrices, bit_widths)
def test_rounding_what_is_rounded_changes_nothing(weights, bits):
    once = rounding.fake_quantize(tf.constant(weights), Grid(bits, (1,)))
    twice = rounding.fake_quantize(once, Grid(bits, (1,)))
    np.testing.assert_array_equal(once.numpy(), twice.numpy())


@settings(deadline=None, max_examples=30)
@given(matrices, bit_widths)
def test_error_is_at_most_half_a_step_and_zero_stays_zero(weights, bits):
    weights[:, 0] = 0
    _, scale = rounding.quantize(weights, Grid(bits, (1,)))
    rounded = rounding.fake_quantize(tf.constant(weights), Grid(bits, (1,))).numpy()
    # The scale may be rounded down by 2**-17, which shows at the largest magnitude.
    bound = 0.5 * scale.numpy() * (1 + 2.0**-8)
    assert (np.abs(rounded - weights) <= bound).all()
    assert (rounded[:, 0] == 0).all()


def test_a_channel_of_zeros_has_scale_one():
    integers, scale = rounding.quantize(np.zeros((2, 3), np.float32), Grid(8, (1,)))
    assert (scale.numpy() == 1).all() and (integers.numpy() == 0).all()


def test_gradients_pass_straight_through():
    weights = tf.Variable(tf.random.normal((4, 6)))
    upstream = tf.random.normal((4, 6))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(rounding.fake_quantize(weights, Grid(4, (1,))) * upstream)
    np.testing.assert_array_equal(tape.gradient(loss, weights).numpy(), upstream.numpy())
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(fake_quantize_rows(weights, (1,)) * upstream)
    np.testing.assert_array_equal(tape.gradient(loss, weights).numpy(), upstream.numpy())


def test_xla_gives_the_same_bits():
    weights = tf.random.normal((64, 64))
    compiled = tf.function(lambda w: rounding.quantize(w, Grid(8, (0,))), jit_compile=True)
    for ours, theirs in zip(
        rounding.quantize(weights, Grid(8, (0,))), compiled(weights), strict=True
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [0.0, 2.0, -5.0])
def test_rows_are_rounded_as_litert_does(bits, shift):
    generator = np.random.default_rng(0)
    weights = generator.normal(0, 0.05, (24, 64)).astype(np.float32)
    inputs = (generator.normal(0, 1, (32, 64)) + shift).astype(np.float32)
    inputs[0] = 0
    integers, scale = (x.numpy() for x in rounding.quantize(weights, Grid(bits, (1,))))
    model = Model("one product")
    graph = model.graph("serve")
    matrix = Matrix("w", integers.astype(np.int8), bits, scale.reshape(-1))
    x = graph.input("x", inputs.shape, np.float32)
    graph.output("y", op.fully_connected(graph, x, matrix))
    run = Interpreter(model_content=bytes(model.pack())).get_signature_runner("serve")
    emulated = fake_quantize_rows(tf.constant(inputs), (-1,)).numpy() @ matrix.floats().T
    np.testing.assert_allclose(run(x=inputs)["y"], emulated, atol=1e-5)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds to 8 significant bits, half away from zero."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.floor(mantissa * 256 + 0.5) / 256, exponent)


kernels = hnp.arrays(
    np.float32,
    st.tuples(st.just(64), st.integers(1, 5)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


@settings(deadline=None, max_examples=25)
@given(kernels)
def test_blocks_have_scales_that_litert_holds_exactly(weights):
    grid = Grid(4, (0,), 32)
    integers, scale = (x.numpy() for x in rounding.quantize(weights, grid))
    largest = np.abs(weights.reshape(2, 32, -1)).max(1, keepdims=True)
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(scale, bfloat16(scale))
    fine = largest / 7 > 2.0**-16
    np.testing.assert_array_equal(scale[fine], bfloat16(largest / np.float32(7))[fine])
    steps = np.clip(np.round(weights.reshape(2, 32, -1) / scale), -7, 7)
    np.testing.assert_array_equal(integers, steps.reshape(weights.shape))


@settings(deadline=None, max_examples=25)
@given(kernels, st.sampled_from([(4, None), (8, None), (4, 32)]), st.floats(0.3, 1.5))
def test_weights_on_a_grid_tell_it(weights, form, factor):
    grid = Grid(form[0], (0,), form[1])
    scale = grid.representable(rounding.absmax_scale(tf.constant(weights), grid) * factor)
    integers, scale = rounding.quantize(weights, grid, scale)
    values = rounding.dequantize(integers, scale, grid)
    found = rounding.found_scale(values, grid)
    again = rounding.dequantize(*rounding.quantize(values, grid, found), grid)
    np.testing.assert_array_equal(again.numpy(), values.numpy())


def test_weights_on_no_grid_tell_none():
    weights = np.random.default_rng(0).normal(0, 1, (64, 3)).astype(np.float32)
    assert rounding.found_scale(tf.constant(weights), Grid(8, (0,))) is None


@pytest.mark.parametrize("block", [None, 32])
def test_the_smallest_squared_error_is_found(block):
    weights = np.random.default_rng(0).standard_t(3, (64, 5)).astype(np.float32)
    grid = Grid(4, (0,), block)
    scale = rounding.mse_scale(tf.constant(weights), grid).numpy()
    blocks = weights.reshape(-1, block or 64, 5)

    def error(one):
        return ((np.clip(np.round(blocks / one), -7, 7) * one - blocks) ** 2).sum(1)

    largest = np.abs(blocks).max(1, keepdims=True) / 7
    tried = [error(largest * ratio) for ratio in np.linspace(0.4, 1, 61)]
    assert (error(scale.reshape(-1, 1, 5)) <= np.min(tried, 0) * 1.05).all()
    assert (error(scale.reshape(-1, 1, 5)) < error(largest) * 0.99).any()


def test_clipped_weights_get_no_gradient():
    weights = tf.Variable([[0.1, -3.0, 0.5, 0.76]])
    scale = tf.constant([[0.1]])
    with tf.GradientTape() as tape:
        rounded = rounding.fake_quantize(weights, Grid(4, (1,)), lambda _: scale)
        loss = tf.reduce_sum(rounded * [[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_array_equal(tape.gradient(loss, weights).numpy(), [[1, 0, 3, 0]])


def test_gradient_of_a_scale_is_the_one_of_lsq():
    generator = np.random.default_rng(0)
    weights = generator.normal(0, 1, (64, 4)).astype(np.float32)
    upstream = generator.normal(0, 1, (64, 4)).astype(np.float32)
    scale = np.float32([[0.1, 0.2, 0.3, 0.05]])
    found = rounding.scale_gradient(
        tf.constant(weights), tf.constant(upstream), tf.constant(scale), Grid(4, (0,))
    )
    ratio = weights / scale
    slope = np.where(ratio <= -7, -7, np.where(ratio >= 7, 7, np.round(ratio) - ratio))
    expected = (slope * upstream).sum(0, keepdims=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def rows_as_litert_rounds_them(inputs):
    """The arithmetic of XNNPACK's rows in numpy: one scale and zero point for each."""
    low, high = np.minimum(inputs.min(-1), 0.0), np.maximum(inputs.max(-1), 0.0)
    inverse = (np.float32(255) / (high - low))[..., None]
    zero = np.clip(np.rint(-128 - low[..., None] * inverse), -128, 127)
    return (np.clip(np.rint(inputs * inverse) + zero, -128, 127) - zero) / inverse


def test_parts_of_rows_have_scales_of_their_own():
    inputs = np.random.default_rng(0).normal(0, 1, (3, 4, 8)).astype(np.float32)
    inputs[:, 0] *= 100
    flat = inputs.reshape(3, 4, 8)
    expected = rows_as_litert_rounds_them(flat)
    for axes, rows in (((1, 2), inputs), ((-2, -1), inputs), ((-1,), inputs.reshape(3, 32))):
        found = fake_quantize_rows(tf.constant(rows), axes, 4).numpy()
        np.testing.assert_allclose(found, expected.reshape(rows.shape), atol=1e-5)
    turned = np.ascontiguousarray(inputs.transpose(2, 0, 1))
    found = fake_quantize_rows(tf.constant(turned), (2, 0), 4).numpy()
    np.testing.assert_allclose(found.transpose(1, 2, 0), expected, atol=1e-5)
    whole = fake_quantize_rows(tf.constant(inputs), (1, 2)).numpy()
    assert np.abs(whole[:, 1:] - inputs[:, 1:]).max() > 10 * np.abs(expected - inputs)[:, 1:].max()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("block", [None, 32, 64])
def test_products_with_blocks_are_those_of_litert(block, parts):
    generator = np.random.default_rng(0)
    weights = generator.normal(0, 0.05, (128, 24)).astype(np.float32)
    inputs = generator.normal(0, 1, (8, 128)).astype(np.float32)
    inputs[:, :64] *= 30
    grid = Grid(4, (0,), block)
    integers, scale = (x.numpy() for x in rounding.quantize(weights, grid))
    rows = np.ascontiguousarray(integers.T.astype(np.int8))
    by_output = scale.reshape(-1) if block is None else np.ascontiguousarray(scale[:, 0].T)
    bias = generator.normal(0, 1, 24).astype(np.float32)
    matrix = Matrix("w", rows, 4, by_output, bias, block, activation_blocks=parts)
    np.testing.assert_array_equal(matrix.floats().T, rounding.dequantize(integers, scale, grid))
    rounded = rows_as_litert_rounds_them(inputs.reshape(8, parts, -1)).reshape(inputs.shape)
    both = ((True, rounded), (False, inputs)) if parts == 1 else ((True, rounded),)
    for rounds_inputs, read in both:
        model = Model("one product")
        graph = model.graph("serve")
        x = graph.input("x", inputs.shape, np.float32)
        one = dataclasses.replace(matrix, rounds_inputs=rounds_inputs)
        graph.output("y", op.fully_connected(graph, x, one))
        run = Interpreter(model_content=bytes(model.pack())).get_signature_runner("serve")
        expected = read.astype(np.float64) @ matrix.floats().T + bias
        np.testing.assert_allclose(run(x=inputs)["y"], expected, atol=2e-4)


@settings(deadline=None, max_examples=30)
@given(
    hnp.arrays(np.float32, (7, 3), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    st.sampled_from([2, 4, 8]),
)
def test_the_largest_weight_needs_no_clipping(weights, bits):
    grid = Grid(bits, (0,))
    integers, scale = rounding.quantize(tf.constant(weights), grid)
    clipped, _ = rounding.quantize(tf.constant(weights), grid, scale)
    np.testing.assert_array_equal(integers, clipped)
