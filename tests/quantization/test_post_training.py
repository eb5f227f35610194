import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch

import tfgptopt
from tfgptopt.decoder import read_decoder
from tfgptopt.model.targets import select
from tfgptopt.pruning import NM, SparseGPT, Wanda
from tfgptopt.quantization import BitAllocation, Int4, Int8, allocate, report


def calibration(rows=16, length=16):
    return random_batch(rows, length)[0]


def error_of(model, exact):
    return float(np.square(np.asarray(model(calibration())) - exact).mean())


METHODS = ["rtn", "mse", "gptq", "awq", "smoothquant", ("smoothquant", "awq", "gptq")]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_file_has_the_integers_that_the_model_computes_with(method):
    model = make_gpt()
    exact = np.asarray(model(calibration()))
    tfgptopt.quantize(model, Int4(block_size=32), method, calibration())
    assert 0 < error_of(model, exact) < 0.2 * exact.var()
    before = np.asarray(model(calibration()))
    dressed = list(read_decoder(model).matrices())
    assert {m.bits for m in dressed} == {4, 8}
    assert {m.block_size for m in dressed if m.bits == 4} == {32}
    weights = {t.path: t for t in select(model, roles=("kernel", "embedding"))}
    for matrix in dressed:
        target = weights[matrix.name]
        rounded = target.to_matrix(target.layer.rounded()).numpy()
        expected = rounded.T if target.role == "kernel" else target.layer.rounded().numpy()
        np.testing.assert_array_equal(matrix.floats(), expected)
    # Finalized weights hold the same integers, or the same values on a coarser step.
    tfgptopt.finalize(model)
    for ours, theirs in zip(read_decoder(model).matrices(), dressed, strict=True):
        np.testing.assert_array_equal(ours.floats(), theirs.floats())
    np.testing.assert_array_equal(before.shape, exact.shape)


def test_gptq_is_nearer_than_rounding_to_nearest():
    errors = {}
    for method in ("rtn", "gptq"):
        model = make_gpt()
        exact = np.asarray(model(calibration(64)))
        tfgptopt.quantize(model, Int4(activations=None), method, calibration(64))
        errors[method] = float(np.square(np.asarray(model(calibration(64))) - exact).mean())
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_pruned_weights_stay_zero_and_the_pattern_holds():
    model = make_gpt()
    tfgptopt.prune(model, pattern=NM(2, 4), score=SparseGPT(calibration(64)))
    zeros = [t.variable.numpy() == 0 for t in select(model)]
    tfgptopt.quantize(model, Int4(), "gptq", calibration(64))
    assert tfgptopt.pruning.report(model).holds
    tfgptopt.finalize(model)
    for target, zero in zip(select(model), zeros, strict=True):
        assert zero.mean() == pytest.approx(0.5, abs=0.01)
        assert (target.variable.numpy()[zero] == 0).all()


def test_training_goes_on_with_the_scales_that_were_found():
    model = make_gpt()
    tfgptopt.quantize(model, Int4(), "mse")
    layer = model.backbone.transformer_layers[0]._feedforward_output_dense
    grid = layer.rounded().numpy()
    steps = [np.unique(np.round(np.abs(column[column != 0]), 7)).min() for column in grid.T]
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    model.fit(*random_batch(), verbose=0)
    after = layer.rounded().numpy()
    assert (after != grid).any()
    np.testing.assert_allclose(after / steps, np.round(after / steps), atol=1e-3)


def test_a_generator_of_batches_serves_all_methods():
    data = [random_batch(rows=4, seed=i)[0] for i in range(2)]
    models = [make_gpt(), make_gpt()]
    models[1].set_weights(models[0].get_weights())
    for model, given in zip(models, (data, (batch for batch in data)), strict=True):
        tfgptopt.quantize(model, Int4(), ("awq", "gptq"), given)
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", ["gptq", ("smoothquant", "gptq")])
def test_inputs_may_be_a_tuple(method):
    a, b = keras.Input((8,)), keras.Input((8,))
    x = keras.layers.Dense(8)(a) + keras.layers.Dense(8)(b)
    model = keras.Model((a, b), keras.layers.Dense(4)(x))
    generator = np.random.default_rng(0)
    inputs = tuple(generator.normal(0, 1, (80, 8)).astype(np.float32) for _ in range(2))
    exact = np.asarray(model(inputs))
    data = tf.data.Dataset.from_tensors((inputs, np.zeros(80, np.float32))).repeat(2)
    tfgptopt.quantize(model, Int8(), method, data)
    assert np.abs(np.asarray(model(inputs)) - exact).max() < 0.05 * exact.std()
    tfgptopt.prune(model, 0.5, score=Wanda(data))


def test_bad_input_changes_nothing():
    model = make_gpt()
    weights = model.get_weights()
    bad = [
        ({"method": "round"}, "must be 'auto', one of"),
        ({"method": ("gptq", "rtn")}, "at most"),
        ({"method": "gptq"}, "needs calibration data"),
        ({"method": "gptq", "data": calibration(0)}, "empty"),
        ({"method": "gptq", "data": calibration(1, 8)}, "8 tokens, which is too little"),
        ({"method": "awq", "data": np.ones((4, 3))}, "cannot read the calibration data"),
        ({"targets": "nothing"}, "matches none"),
        ({"spec": Int4(block_size=64)}, r"has 32. Received: block_size=64. .*\[32\]"),
        ({"spec": "int4"}, "must be Int8"),
    ]
    tokens = calibration()
    tokens["token_ids"] = tokens["token_ids"] + 1000
    bad.append(({"method": "smoothquant", "data": tokens}, "cannot read the calibration data"))
    for settings, message in bad:
        with pytest.raises(ValueError, match=message):
            tfgptopt.quantize(model, **{"spec": Int4(), **settings})
    for ours, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(ours, before)
    assert not any(m.bits for m in read_decoder(model).matrices())
    tfgptopt.quantize(model, Int8())
    with pytest.raises(ValueError, match="quantize-aware already"):
        tfgptopt.quantize(model, Int8())


def test_few_tokens_are_warned_of():
    with pytest.warns(UserWarning, match="fewer than the"):
        model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(4)])
        tfgptopt.quantize(model, Int8(), "gptq", np.ones((100, 256), np.float32))


def test_nan_weights_are_named():
    model = make_gpt()
    layer = model.backbone.transformer_layers[1]._feedforward_output_dense
    layer.kernel.assign(layer.kernel * np.nan)
    with pytest.raises(ValueError, match="feedforward_output_dense/kernel is NaN"):
        tfgptopt.quantize(model, Int8())


def test_bits_go_where_the_loss_needs_them(tmp_path):
    model = make_gpt()
    # Only this weight decides on the logits to speak of.
    decisive = model.backbone.transformer_layers[1]._feedforward_output_dense.kernel
    decisive.assign(decisive * 40)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    inputs = random_batch(16)[0]
    labels = np.argmax(model(inputs), -1)
    before = model.get_weights()
    data = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8)
    found = allocate(model, data, 5.6, (Int4(), Int8()), targets="transformer")
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.specs[decisive.path] == Int8()
    assert set(found.specs.values()) == {Int4(), Int8()}
    sizes = {t.path: (t.size, t.matrix_shape[0]) for t in select(model)}
    bits = [found.specs[p].bits + 32 / inputs for p, (_, inputs) in sizes.items()]
    mean = np.average(bits, weights=[size for size, _ in sizes.values()])
    assert found.mean_bits == pytest.approx(mean) and mean <= 5.6
    assert "bits per weight" in str(found)
    found.plot(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"at least 4\.\d+"):
        allocate(model, data, 4.0, (Int4(), Int8()), targets="transformer")
    tfgptopt.quantize(model, found, targets="transformer")
    assert decisive.path in [row.path for row in report(model).rows if row.bits == 8]
    with pytest.raises(ValueError, match="none of the chosen weights"):
        tfgptopt.quantize(make_gpt(), BitAllocation({"elsewhere/kernel": Int8()}))


def test_bits_go_where_predictions_move():
    model = make_gpt()
    decisive = model.backbone.transformer_layers[1]._feedforward_output_dense.kernel
    decisive.assign(decisive * 40)
    inputs = random_batch(4)[0]
    inputs["padding_mask"][0, 5:] = 0
    exact = tf.nn.softmax(model(inputs)).numpy()
    found = allocate(model, inputs, 5.6, (Int4(), Int8()), targets="transformer", by="kl")
    assert found.specs[decisive.path] == Int8()
    rise = {one.spec: one.rise for one in found.measured[decisive.path]}
    assert 0 < rise[Int8()] < rise[Int4()]
    # The same by the formula.
    (layer,) = (x for x in model._flatten_layers() if getattr(x, "_kernel", None) is decisive)
    scale = np.abs(decisive.numpy()).max(0) / 7
    layer.kernel.assign(np.clip(np.rint(decisive.numpy() / scale), -7, 7) * scale)
    rounded = tf.nn.softmax(model(inputs)).numpy()
    each = (exact * np.log(exact / rounded)).sum(-1)
    mean = np.average(each, weights=inputs["padding_mask"])
    assert rise[Int4()] == pytest.approx(mean, rel=0.02)
    with pytest.raises(ValueError, match="`by` must be"):
        allocate(model, inputs, 5.6, by="accuracy")


def test_report_is_the_formula():
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    data = np.random.default_rng(0).normal(0, 1, (64, 32)).astype(np.float32)
    kernel = np.random.default_rng(1).standard_t(4, (32, 8)).astype(np.float32)
    model.layers[0].kernel.assign(kernel)
    tfgptopt.quantize(model, Int4(), "mse", targets=lambda t: t.layer is model.layers[0])
    row = report(model, data).rows[0]
    rounded = model.layers[0].rounded().numpy()
    noise = np.square(rounded - kernel).sum()
    assert row.weight_sqnr == pytest.approx(
        10 * np.log10(np.square(kernel).sum() / noise), abs=0.01
    )
    exact = data @ kernel
    given = np.asarray(model.layers[0](data)) - model.layers[0].bias.numpy()
    outputs = 10 * np.log10(np.square(exact).sum() / np.square(given - exact).sum())
    assert row.output_sqnr == pytest.approx(outputs, abs=0.05)
    limit = np.abs(rounded).max(0)
    assert row.clipped == pytest.approx((np.abs(kernel) > limit * 7.5 / 7).mean(), abs=1e-6)
    assert row.clipped > 0
    assert "signal to noise" in str(report(model))
    tfgptopt.finalize(model)
    with pytest.raises(ValueError, match="no rounded weights"):
        report(model)
