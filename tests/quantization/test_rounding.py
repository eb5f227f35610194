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


@settings(deadline=None, max_examples=80)
@given(matrices, bit_widths)
def test_integers_and_scale_are_the_formula(weights, bits):
    integers, scale = (x.numpy() for x in rounding.quantize(weights, Grid(bits, (1,))))
    np.testing.assert_array_equal(scale, numpy_scale(weights, bits))
    limit = 2 ** (bits - 1) - 1
    expected = np.clip(np.round(weights / scale), -limit, limit)
    np.testing.assert_array_equal(integers, expected)


@settings(deadline=None, max_examples=80)
@given(matrices, bit_widths)
def test_rounding_what_is_rounded_changes_nothing(weights, bits):
    once = rounding.fake_quantize(tf.constant(weights), Grid(bits, (1,)))
    twice = rounding.fake_quantize(once, Grid(bits, (1,)))
    np.testing.assert_array_equal(once.numpy(), twice.numpy())


@settings(deadline=None, max_examples=80)
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
        loss = tf.reduce_sum(rounding.fake_quantize_rows(weights, (1,)) * upstream)
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
    emulated = rounding.fake_quantize_rows(tf.constant(inputs), (-1,)).numpy() @ matrix.floats().T
    np.testing.assert_allclose(run(x=inputs)["y"], emulated, atol=1e-5)
