import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfgptopt.pruning import ConstantSparsity, Unstructured
from tfgptopt.pruning.patterns import keep_largest

floats = st.floats(-100, 100, width=32, allow_subnormal=False)


def numpy_mask(weights: np.ndarray, sparsity: float) -> np.ndarray:
    """The definition: drop the smallest magnitudes, the later of equal ones first."""
    count = max(1, int(np.round(np.float32(weights.size) * np.float32(1 - np.float32(sparsity)))))
    order = np.argsort(-np.abs(weights).reshape(-1), kind="stable")
    mask = np.zeros(weights.size, np.float32)
    mask[order[:count]] = 1
    return mask.reshape(weights.shape)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=12), elements=floats),
    st.floats(0, 0.99),
)
def test_unstructured_is_numpys_definition(weights, sparsity):
    scores = tf.abs(weights.reshape(len(weights), -1))
    (mask,) = Unstructured().masks([scores], [tf.constant(sparsity, tf.float32)])
    expected = numpy_mask(weights, sparsity).reshape(scores.shape)
    np.testing.assert_array_equal(mask, expected)


def test_rows_are_independent_and_ties_keep_the_first():
    scores = tf.constant([[3.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]])
    (mask,) = keep_largest([scores], tf.constant(2))
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 0, 0, 1]])


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_mask_equals_tfmots_own(sparsity):
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

    weights = tf.random.normal((48, 64), seed=3)
    pruning = pruning_impl.Pruning(
        training_step_fn=lambda: tf.constant(0),
        pruning_vars=[],
        pruning_schedule=ConstantSparsity(sparsity, 0, frequency=1),
        block_size=(1, 1),
        block_pooling_type="AVG",
    )
    _, theirs = pruning._update_mask(weights)
    (ours,) = Unstructured().masks([tf.abs(weights)], [tf.constant(sparsity, tf.float32)])
    np.testing.assert_array_equal(ours, theirs)
