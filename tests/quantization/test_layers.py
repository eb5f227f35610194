import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch

import tfgptopt
from tfgptopt.quantization import Int4, Int8


def round_rows(x: np.ndarray) -> np.ndarray:
    """LiteRT's rounding of activations, written once more in numpy."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (255 / (high - low)).astype(np.float32)
    low_wins = (-128 + low * scale) + (127 + high * scale) > 0
    zero = np.where(low_wins, -128 - low * scale, 127 - high * scale)
    zero = np.round(np.clip(zero, -128, 127))
    return np.clip(np.round(x * scale) + zero, -128, 127).astype(np.float32) / scale - zero / scale


def round_weights(w: np.ndarray, axis: int, limit: int) -> np.ndarray:
    """Symmetric rounding in numpy, but for the scale's last bits."""
    scale = np.abs(w).max(axis, keepdims=True) / limit
    return np.round(w / scale) * scale


@pytest.mark.parametrize(("spec", "limit"), [(Int8(), 127), (Int4(), 7)])
def test_dense_computes_with_rounded_weights_and_inputs(spec, limit):
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8, activation="relu")])
    x = np.random.default_rng(0).normal(0, 1, (5, 16)).astype(np.float32)
    kernel, bias = model.get_weights()
    bias[:] = 0.1
    model.set_weights([kernel, bias])
    tfgptopt.quantize_aware(model, spec)
    expected = np.maximum(round_rows(x) @ round_weights(kernel, 0, limit) + bias, 0)
    np.testing.assert_allclose(model(x), expected, atol=1e-4)
    assert np.abs(expected - np.maximum(x @ kernel + bias, 0)).max() > 1e-3


def test_tied_table_is_rounded_row_by_row_for_both_uses():
    layer = keras.layers.ReversibleEmbedding(10, 16)
    layer.build()
    table = layer.embeddings.numpy()
    tfgptopt.quantize_aware(layer, Int4(embedding_bits=4))
    rounded = round_weights(table, 1, 7)
    np.testing.assert_allclose(layer(np.arange(10)), rounded, atol=1e-4)
    hidden = np.random.default_rng(1).normal(0, 1, (3, 16)).astype(np.float32)
    np.testing.assert_allclose(
        layer(hidden, reverse=True), round_rows(hidden) @ rounded.T, atol=1e-4
    )


def test_int4_keeps_the_table_at_8_bits_by_default():
    layer = keras.layers.Embedding(10, 16)
    layer.build()
    table = layer.embeddings.numpy()
    tfgptopt.quantize_aware(layer, Int4())
    np.testing.assert_allclose(layer(np.arange(10)), round_weights(table, 1, 127), atol=1e-5)


def test_dressing_keeps_class_names_paths_and_checkpoints(gpt, tmp_path):
    paths = [w.path for w in gpt.weights]
    weights = gpt.get_weights()
    layer = gpt.backbone.transformer_layers[0]._feedforward_output_dense
    tfgptopt.quantize_aware(gpt, Int8())
    assert isinstance(layer, keras.layers.Dense)
    assert [w.path for w in gpt.weights] == paths
    gpt.save_weights(tmp_path / "dressed.weights.h5")
    plain = make_gpt()
    plain.load_weights(tmp_path / "dressed.weights.h5")
    for ours, theirs in zip(plain.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain.save_weights(tmp_path / "plain.weights.h5")
    gpt.load_weights(tmp_path / "plain.weights.h5")


def test_training_moves_the_full_precision_weights_through_the_rounding(gpt):
    gpt.compile(optimizer=keras.optimizers.Adam(1e-5))
    tfgptopt.quantize_aware(gpt, Int8())
    before = [w.copy() for w in gpt.get_weights()]
    gpt.fit(*random_batch(), verbose=0)
    for weight, old in zip(gpt.weights, before, strict=True):
        step = np.abs(old).max() / 127
        if weight.path.endswith("kernel"):
            change = np.abs(weight.numpy() - old).max()
            # Moved by less than the grid shows: these are the masters, not rounded copies.
            assert 0 < change < step


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_rounds_the_float32_weights(policy):
    layer = keras.layers.Dense(8, dtype=policy)
    layer.build((None, 16))
    x = np.random.default_rng(0).normal(0, 1, (4, 16)).astype(np.float32)
    tfgptopt.quantize_aware(layer, Int8())
    expected = round_rows(x) @ round_weights(layer.kernel.numpy(), 0, 127)
    assert layer(x).dtype == layer.compute_dtype
    np.testing.assert_allclose(np.asarray(layer(x), np.float32), expected, atol=0.05)
    table = keras.layers.ReversibleEmbedding(10, 16, dtype=policy)
    table.build()
    tfgptopt.quantize_aware(table, Int8())
    rows = np.asarray(table(np.arange(10)), np.float32)
    np.testing.assert_allclose(rows, round_weights(table.embeddings.numpy(), 1, 127), atol=1e-3)


def test_a_saved_keras_model_comes_back_dressed(tmp_path):
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), keras.layers.Embedding(9, 8), keras.layers.Dense(4)]
    )
    tfgptopt.quantize_aware(model, Int4(activation_blocks=2))
    x = np.arange(6)[np.newaxis]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.layers[1].quantization_spec == Int4(activation_blocks=2)
    np.testing.assert_array_equal(model(x), again(x))


def test_finalize_gives_plain_layers_on_the_grid(gpt):
    tfgptopt.quantize_aware(gpt, Int8())
    layer = gpt.backbone.transformer_layers[0]._feedforward_output_dense
    kernel = layer.kernel.numpy()
    tfgptopt.finalize(gpt)
    assert type(layer) is keras.layers.Dense
    steps = layer.kernel.numpy() / (np.abs(layer.kernel.numpy()).max(0) / 127)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    half_a_step = np.abs(kernel).max(0) / 127 / 2
    assert (np.abs(layer.kernel.numpy() - kernel) <= half_a_step * 1.01).all()
    with pytest.raises(ValueError, match="nothing to finalize"):
        tfgptopt.finalize(gpt)


def test_bad_input_changes_nothing(gpt):
    layer = gpt.backbone.transformer_layers[0]._feedforward_output_dense
    with pytest.raises(ValueError, match=r"must be Int8\(\) or Int4\(\)"):
        tfgptopt.quantize_aware(gpt, "int8")
    with pytest.raises(ValueError, match=r"must be Int8\(\) or Int4\(\)"):
        tfgptopt.quantize_aware(gpt, Int8)
    with pytest.raises(ValueError, match="matches none"):
        tfgptopt.quantize_aware(gpt, Int8(), "nothing")
    assert type(layer) is keras.layers.Dense
    with pytest.raises(ValueError, match="4 or 8"):
        Int4(embedding_bits=2)
    tfgptopt.quantize_aware(gpt, Int8(), "feedforward")
    with pytest.raises(ValueError, match=r"quantize-aware already, with Int8\(\)"):
        tfgptopt.quantize_aware(gpt, Int4())
