import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfgptopt.pruning import NM, Block, Columns, ConstantSparsity, Rows, Unstructured
from tfgptopt.pruning.keeping import keep_largest, traced_once
from tfgptopt.pruning.patterns import deserialize_pattern, serialize_pattern

floats = st.floats(-100, 100, width=32, allow_subnormal=False)


def numpy_mask(weights: np.ndarray, sparsity: float) -> np.ndarray:
    """The definition: drop the smallest magnitudes, the later of equal ones first."""
    count = max(1, int(np.round(np.float32(weights.size) * np.float32(1 - np.float32(sparsity)))))
    order = np.argsort(-np.abs(weights).reshape(-1), kind="stable")
    mask = np.zeros(weights.size, np.float32)
    mask[order[:count]] = 1
    return mask.reshape(weights.shape)


@settings(deadline=None, max_examples=25)
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


def masks_of(pattern, scores, sparsity):
    (mask,) = pattern.masks([tf.constant(scores)], [tf.constant(sparsity, tf.float32)])
    return mask.numpy()


matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 13), st.integers(1, 7)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


def numpy_nm(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """The definition: the n highest of each m inputs stay, the earlier of equal ones."""
    mask = np.zeros(scores.shape, bool)
    for begin in range(0, len(scores), m):
        group = scores[begin : begin + m]
        best = np.argsort(-group, axis=0, kind="stable")[:n]
        np.put_along_axis(mask[begin : begin + m], best, True, axis=0)
    return mask


@settings(deadline=None, max_examples=25)
@given(matrices, st.sampled_from([(1, 2), (2, 4), (1, 3), (4, 8)]))
def test_nm_is_numpys_definition(scores, nm):
    pattern = NM(*nm)
    mask = masks_of(pattern, scores, pattern.sparsity)
    np.testing.assert_array_equal(mask, numpy_nm(scores, *nm))
    assert pattern.holds(mask)


@settings(deadline=None, max_examples=25)
@given(matrices, st.sampled_from([(1, 2), (2, 4), (1, 3)]), st.sampled_from(["input", "output"]))
def test_nm_along_either_axis_in_tensorflow_and_in_numpy(scores, nm, axis):
    pattern = NM(*nm, axis=axis)
    expected = numpy_nm(scores, *nm) if axis == "input" else numpy_nm(scores.T, *nm).T
    np.testing.assert_array_equal(masks_of(pattern, scores, pattern.sparsity), expected)
    np.testing.assert_array_equal(pattern.keep(scores, pattern.sparsity), expected)
    assert pattern.holds(expected)


def test_nm_along_outputs_says_so():
    with pytest.raises(ValueError, match=r"'input' or 'output'. Received: 'columns'"):
        NM(2, 4, axis="columns")
    with pytest.raises(ValueError, match="x has 3 outputs, fewer than one group"):
        NM(2, 4, axis="output").check((8, 3), "x")
    assert deserialize_pattern({"name": "nm", "n": 2, "m": 4}) == NM(2, 4)
    config = serialize_pattern(NM(2, 4, axis="output"))
    assert deserialize_pattern(config) == NM(2, 4, axis="output")


def test_nm_half_way_drops_the_lowest_of_those_that_will_go():
    scores = np.random.default_rng(0).normal(0, 1, (16, 8)).astype(np.float32) ** 2
    mask = masks_of(NM(2, 4), scores, 0.25)
    going = np.sort(scores[~numpy_nm(scores, 2, 4)])
    assert (~mask).sum() == 32
    np.testing.assert_array_equal(np.sort(scores[~mask]), going[:32])
    assert not NM(2, 4).holds(mask)


def numpy_blocks(scores: np.ndarray, rows: int, columns: int, sparsity: float) -> np.ndarray:
    """The definition: the blocks with the highest means stay, the earlier of equal ones."""
    corners = [
        (i, j) for i in range(0, scores.shape[0], rows) for j in range(0, scores.shape[1], columns)
    ]
    means = [np.float32(scores[i : i + rows, j : j + columns].mean()) for i, j in corners]
    kept = np.float32(len(corners)) * (np.float32(1) - np.float32(sparsity))
    count = max(1, int(np.round(kept)))
    mask = np.zeros(scores.shape, bool)
    for index in np.argsort(-np.array(means), kind="stable")[:count]:
        i, j = corners[index]
        mask[i : i + rows, j : j + columns] = True
    return mask


@settings(deadline=None, max_examples=25)
@given(
    # Whole numbers, whose sums are exact in any order.
    hnp.arrays(
        np.float32, st.tuples(st.integers(4, 13), st.integers(4, 9)), elements=st.integers(0, 9)
    ),
    st.sampled_from([(4, 1), (1, 4), (2, 2), (4, 4), (2, 1)]),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)
def test_blocks_are_numpys_definition(scores, size, sparsity):
    pattern = Block(*size)
    mask = masks_of(pattern, scores, sparsity)
    np.testing.assert_array_equal(mask, numpy_blocks(scores, *size, sparsity))
    assert pattern.holds(mask)


def test_rows_and_columns_are_blocks_of_one():
    scores = np.random.default_rng(0).uniform(0, 1, (12, 9)).astype(np.float32)
    np.testing.assert_array_equal(masks_of(Rows(), scores, 0.5), numpy_blocks(scores, 1, 9, 0.5))
    np.testing.assert_array_equal(
        masks_of(Columns(), scores, 0.5), numpy_blocks(scores, 12, 1, 0.5)
    )
    assert Rows().holds(masks_of(Rows(), scores, 0.5))
    assert not Columns().holds(masks_of(Rows(), scores, 0.5))


def test_scopes_choose_who_competes():
    generator = np.random.default_rng(0)
    scores = [generator.normal(0, scale, (8, 6)).astype(np.float32) ** 2 for scale in (1, 3)]
    together = np.concatenate([s.reshape(-1) for s in scores])
    kept = np.zeros(96, bool)
    kept[np.argsort(-together)[:48]] = True
    halves = [tf.constant(0.5)] * 2
    for mask, expected in zip(
        Unstructured("model").masks([tf.constant(s) for s in scores], halves),
        kept.reshape(2, 8, 6),
        strict=True,
    ):
        np.testing.assert_array_equal(mask, expected)
    by_output = masks_of(Unstructured("output"), scores[0], 0.5)
    assert (by_output.sum(axis=0) == 4).all()
    np.testing.assert_array_equal(by_output, scores[0] >= np.sort(scores[0], axis=0)[4])


@pytest.mark.parametrize(("block", "sparsity"), [((4, 1), 0.5), ((2, 2), 0.75), ((1, 16), 0.3)])
def test_blocks_equal_tfmots_own(block, sparsity):
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

    weights = tf.random.normal((48, 64), seed=3)
    pruning = pruning_impl.Pruning(
        training_step_fn=lambda: tf.constant(0),
        pruning_vars=[],
        pruning_schedule=ConstantSparsity(sparsity, 0, frequency=1),
        block_size=block,
        block_pooling_type="AVG",
    )
    _, theirs = pruning._maybe_update_block_mask(weights)
    np.testing.assert_array_equal(masks_of(Block(*block), abs(weights.numpy()), sparsity), theirs)


def test_2_of_4_equals_tfmots_own():
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_utils

    weights = tf.random.normal((48, 64), seed=3)
    # tfmot counts along the outputs of a Dense kernel unless it is told to transpose.
    theirs = tf.transpose(
        pruning_utils.generate_m_by_n_mask(tf.transpose(weights), tf.constant([2, 4]))
    )
    np.testing.assert_array_equal(masks_of(NM(2, 4), abs(weights.numpy()), 0.5), theirs)


def test_settings_out_of_range_and_back_from_plain_data():
    for wrong in (lambda: NM(4, 4), lambda: NM(0, 4), lambda: Block(1, 1), lambda: Block(0, 2)):
        with pytest.raises(ValueError, match="Received"):
            wrong()
    with pytest.raises(ValueError, match="`scope` must be"):
        Unstructured("layer")
    for pattern in (Unstructured("model"), NM(2, 4), Block(4, 1), Rows(), Columns()):
        assert deserialize_pattern(serialize_pattern(pattern)) == pattern
    with pytest.raises(ValueError, match="one of unstructured, nm"):
        deserialize_pattern({"name": "random"})


def test_graphs_trace_once_a_shape_and_eager_calls_trace_nothing():
    eager = []

    @traced_once
    def double(x):
        eager.append(tf.executing_eagerly())
        return 2 * x

    four = tf.function(lambda x: double(x) + double(2 * x) - double(x[:1]))(tf.ones(3))
    np.testing.assert_array_equal(four, [4, 4, 4])
    assert eager == [False, False]  # For two shapes, of three calls.
    double(tf.ones(5))
    assert eager == [False, False, True]
