from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch

import tfgptopt.pruning
from tfgptopt.calibration.batches import batches_of, with_start
from tfgptopt.calibration.blocks import block_by_block, targets_by_block
from tfgptopt.calibration.statistics import Grams
from tfgptopt.calibration.watching import observe_all
from tfgptopt.model.targets import select


def batches(count=2):
    return [random_batch(rows=2, seed=i)[0] for i in range(count)]


def test_rows_are_what_each_kernel_multiplies():
    model = make_gpt()
    seen = {}

    def observe(target, rows):
        seen.setdefault(target.path, []).append(rows.numpy())

    data = batches(1)
    observe_all(model, select(model), data, observe)
    assert set(seen) == {target.path for target in select(model)}
    # The input of the feed-forward network, from Keras' own layers.
    block = model.backbone.transformer_layers[0]
    inner = keras.Model(model.backbone.inputs, block.output)
    (expected,) = [
        s for path, s in seen.items() if "transformer_layer_1" in path and "/query" in path
    ]
    normed = model.backbone.transformer_layers[1]._self_attention_layer_norm(inner(data[0]))
    np.testing.assert_allclose(expected[0], tf.reshape(normed, (-1, 32)), atol=1e-5)


def test_an_equation_with_axes_in_another_order():
    layer = keras.layers.EinsumDense("abc,cbd->ad", output_shape=(5,))
    model = keras.Sequential([keras.Input((3, 4)), layer])
    x = np.random.default_rng(0).normal(0, 1, (6, 3, 4)).astype(np.float32)
    (target,) = select(model)
    products = []
    observe_all(
        model, [target], x, lambda t, rows: products.append(rows @ t.to_matrix(t.variable.value))
    )
    np.testing.assert_allclose(products[0], model(x), atol=1e-5)
    restored = target.from_matrix(target.to_matrix(target.variable.value))
    np.testing.assert_array_equal(restored, target.variable)


@pytest.mark.parametrize("chain", [True, False])
def test_a_block_sees_what_changed_blocks_before_it_give(chain):
    if chain:
        model = make_gpt()
        data = batches()
    else:
        # The last layer reads the input as well as the result of the first.
        inputs = keras.Input((8,))
        hidden = keras.layers.Dense(8, name="first")(inputs)
        both = keras.layers.Concatenate()([hidden, inputs])
        model = keras.Model(inputs, keras.layers.Dense(4, name="second")(both))
        data = [np.random.default_rng(i).normal(0, 1, (4, 8)).astype(np.float32) for i in (1, 2)]
    targets = select(model)
    found = {}
    for members, run in block_by_block(model, targets, data):
        run(lambda target, rows: found.setdefault(target.path, []).append(rows.numpy()))
        for target in members:
            target.variable.assign(target.variable * 0.5)
    # The model holds the changed weights now: its own pass must show the same rows for every
    # first layer of a block, which sees only changed blocks before it.
    again = {}
    observe_all(
        model, targets, data, lambda t, rows: again.setdefault(t.path, []).append(rows.numpy())
    )
    firsts = [members[0].path for members in targets_by_block(model, targets)]
    assert len(firsts) == 2
    for path in firsts:
        np.testing.assert_allclose(found[path], again[path], atol=1e-5)


def test_query_key_and_value_share_one_gram():
    model = make_gpt()
    grams, expected = Grams(), {}

    def observe(target, rows):
        grams(target, rows)
        expected[target.path] = expected.get(target.path, 0) + rows.numpy().T @ rows.numpy()

    observe_all(model, select(model), batches(), observe)
    assert len(grams._grams) == 2 * 4  # Three projections share one of six inputs.
    for target in select(model):
        np.testing.assert_allclose(grams.of(target), expected[target.path], rtol=1e-4, atol=1e-3)


def test_padding_is_left_out():
    model = make_gpt()
    (batch,) = batches(1)
    batch["padding_mask"][:, 10:] = 0
    rows = []
    observe_all(model, select(model)[:1], [batch], lambda _, r: rows.append(len(r)))
    assert rows == [20]
    targets, rows = select(model), []
    for _, run in block_by_block(model, targets, [batch]):
        run(lambda _, r: rows.append(len(r)))
    assert rows == [20] * len(targets)


def test_bad_data_is_named_and_the_model_runs_on():
    model = make_gpt()
    repeated = tf.data.Dataset.from_tensors(np.ones(3)).repeat()
    for wrong in (None, [], {"token_ids": np.zeros((0, 4))}, repeated):
        with pytest.raises(ValueError, match=r"alibration"):
            batches_of(wrong)
    with pytest.raises(ValueError, match="cannot read the calibration data"):
        observe_all(model, select(model), [np.ones((2, 3, 4))], lambda t, r: None)
    assert all("call" not in vars(target.layer) for target in select(model))
    assert model(batches(1)[0]).shape == (2, 16, 300)


def test_a_layer_that_is_called_three_times_is_seen_three_times():
    layer = keras.layers.Dense(8)
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layer(layer(layer(inputs))))
    x = np.random.default_rng(0).normal(0, 1, (4, 8)).astype(np.float32)
    calls = []
    observe_all(model, select(model), x, lambda target, rows: calls.append(rows.numpy()))
    np.testing.assert_allclose(np.stack(calls), [x, layer(x), layer(layer(x))], atol=1e-5)
    grams = Grams()
    ((_, run),) = block_by_block(model, select(model), x)
    run(grams)
    expected = sum(rows.T.astype(np.float64) @ rows for rows in calls)
    np.testing.assert_allclose(grams.of(select(model)[0]), expected, rtol=1e-4, atol=1e-3)


def test_arrays_are_cut_and_labels_are_left_out():
    x, y = np.ones((70, 4)), np.zeros(70)
    assert [len(batch) for batch in batches_of((x, y))] == [32, 32, 6]
    assert [len(batch["a"]) for batch in batches_of({"a": x})] == [32, 32, 6]
    assert len(batches_of([(x, y), (x, y)])) == 2


def test_what_is_no_product_with_one_matrix_is_refused():
    grouped = keras.layers.EinsumDense("abc,bcd->abd", output_shape=(3, 5))
    model = keras.Sequential([keras.Input((3, 4)), grouped])
    with pytest.raises(ValueError, match="no product of rows with one matrix"):
        observe_all(model, select(model), np.ones((2, 3, 4)), lambda t, r: None)
    gpt = make_gpt()
    tables = select(gpt, keras.layers.Embedding)
    with pytest.raises(ValueError, match="is a table"):
        list(block_by_block(gpt, tables, batches()))


def test_statistics_that_are_not_finite_change_nothing():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    x = np.ones((4, 8), np.float32)
    x[0, 0] = np.nan
    before = model.get_weights()[0]
    for score in (tfgptopt.pruning.SparseGPT(x), tfgptopt.pruning.Wanda(x)):
        with pytest.raises(ValueError, match="is NaN or infinite on the calibration data"):
            tfgptopt.prune(model, 0.5, score=score)
        np.testing.assert_array_equal(model.get_weights()[0], before)


class Counting(keras.layers.Layer):
    """Counts the rows that reach it, as a head would."""

    rows = 0

    def call(self, inputs):
        Counting.rows += int(inputs.shape[0]) if inputs.shape[0] is not None else 0
        return inputs


@pytest.mark.parametrize("chain", [True, False])
def test_what_lies_behind_the_last_kernel_is_not_computed(chain):
    inputs = keras.Input((8,))
    first, second = keras.layers.Dense(8), keras.layers.Dense(8)
    x = first(inputs)
    x = second(x if chain else keras.layers.Concatenate()([inputs, x]))
    model = keras.Model(inputs, Counting()(x))
    data = np.random.default_rng(0).normal(0, 1, (64, 8)).astype(np.float32)
    chosen, seen = select(model), []
    Counting.rows = 0
    observe_all(model, chosen, data, lambda target, rows: seen.append(len(rows)))
    for _, run in block_by_block(model, chosen, data):
        run(lambda target, rows: seen.append(len(rows)))
    assert sum(seen) == 2 * 2 * len(data)
    assert Counting.rows <= 10  # One row now and then, to see how the model calls its layers.


class OneByOne(keras.layers.Layer):
    """Calls a layer once for each position, as recurrent ones do."""

    def __init__(self):
        super().__init__()
        self.inner, self.after = keras.layers.Dense(8), keras.layers.Dense(8)

    def build(self, shape):
        self.inner.build((None, 8))
        self.after.build((None, None, 8))

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        found = [self.inner(x[:, i]) for i in range(x.shape[1])]
        return self.after(keras.ops.stack(found, axis=1))


def test_layers_that_are_called_more_often_for_longer_texts_are_seen_to_the_end():
    tokens = keras.Input((None,), dtype="int32")
    body = OneByOne()
    model = keras.Model(tokens, body(keras.layers.Embedding(20, 8)(tokens)))
    data = np.random.default_rng(0).integers(0, 20, (2, 100)).astype(np.int32)
    chosen, seen = [t for t in select(model) if t.layer is body.inner], []
    assert len(chosen) == 1
    observe_all(model, chosen, data, lambda target, rows: seen.append(len(rows)))
    assert sum(seen) == 200


def test_a_model_that_reads_one_shape_only_is_calibrated_with_whole_batches():
    layers = [keras.layers.Embedding(50, 8), keras.layers.Reshape((96,)), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((12,), dtype="int32"), *layers])
    tokens = np.random.default_rng(0).integers(0, 50, (40, 12)).astype(np.int32)
    seen = []
    observe_all(model, select(model), tokens, lambda target, rows: seen.append(len(rows)))
    assert sum(seen) == 40


@pytest.mark.parametrize("adds", [True, False])
def test_texts_begin_with_the_start_token_where_the_model_is_given_one(adds):
    model = SimpleNamespace(
        preprocessor=SimpleNamespace(
            tokenizer=SimpleNamespace(start_token_id=2), add_start_token=adds
        )
    )
    tokens = np.asarray([[5, 6, 7], [2, 8, 9]])
    (batch,) = with_start(model, batches_of([{"token_ids": tokens, "mask": tokens > 0}]))
    expected = [[2, 5, 6], [2, 8, 9]] if adds else tokens
    np.testing.assert_array_equal(batch["token_ids"], expected)
    np.testing.assert_array_equal(batch["mask"], tokens > 0)
