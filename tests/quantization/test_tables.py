"""Token tables and heads of 4 bits in blocks."""

import keras
import numpy as np
import pytest
from decoder.families import CONTEXT, VOCABULARY, logits, make, prompt
from tfgptopt.callbacks import QuantizationAwareTraining

import tfgptopt
from tfgptopt.decoder import read_decoder
from tfgptopt.exporting import TFLite
from tfgptopt.quantization import Int4
from tfgptopt.quantization.quantizers import quantizers_of

TEXT = prompt(40)
BLOCKS = Int4(embedding_bits=4, embedding_block_size=32)


def rounded_in_blocks(table):
    """4 bits in blocks of 32 by numpy; scales keep 8 bits."""
    blocks = table.reshape(len(table), -1, 32)
    mantissa, exponent = np.frexp(np.abs(blocks).max(-1, keepdims=True).astype(np.float32) / 7)
    scale = np.ldexp(np.floor(mantissa * 256 + 0.5) / 256, exponent)
    return (np.clip(np.rint(blocks / scale), -7, 7) * scale).reshape(table.shape)


@pytest.mark.parametrize("scale", ["absmax", "mse", "learned"])
def test_what_is_looked_up_is_what_the_head_multiplies_with(scale):
    layer = keras.layers.ReversibleEmbedding(10, 64)
    layer.build()
    table = layer.embeddings.numpy()
    tfgptopt.quantize_aware(layer, Int4(None, 4, scale, embedding_block_size=32))
    rows = np.asarray(layer(np.arange(10).reshape(2, 5))).reshape(10, 64)
    np.testing.assert_array_equal(rows, layer.rounded())
    if scale == "absmax":
        np.testing.assert_allclose(rows, rounded_in_blocks(table), rtol=1e-6)
    step = np.abs(table.reshape(10, 2, 32)).max(-1).repeat(32, 1) / 7
    assert (np.abs(rows - table) <= 0.51 * step).mean() > 0.8
    hidden = np.random.default_rng(0).normal(0, 1, (3, 64)).astype(np.float32)
    given = np.asarray(layer(hidden, reverse=True))
    assert np.abs(given - hidden @ rows.T).max() < 0.02 * np.abs(given).max()


@pytest.mark.parametrize("tied", [True, False])
def test_files_hold_the_blocks_once_and_compute_with_them(tied, tmp_path):
    sizes = {}
    for spec in (Int4(embedding_bits=4), BLOCKS):
        model = make("Llama3", hidden_dim=64, tie_word_embeddings=tied)
        tfgptopt.quantize_aware(model, spec)
        path = tfgptopt.export(model, tmp_path / f"{len(sizes)}.tflite", TFLite(CONTEXT))
        sizes[spec] = path.stat().st_size
    table = read_decoder(model).token_embedding
    assert (table.bits, table.block_size, table.scale.shape) == (4, 32, (211, 2))
    np.testing.assert_array_equal(table.floats(), model.backbone.token_embedding.rounded())
    expected = logits(model, TEXT)
    engine = tfgptopt.TFLiteCausalLM(path)._engine
    found = engine.score(engine.new_cache(), TEXT)
    # One activation at the edge between two integers may fall either way.
    assert np.abs(found - expected).max() < 0.02 * expected.std()
    # Two scales of 16 bits in place of one of 32, and of none of its zero point.
    assert sizes[BLOCKS] < sizes[Int4(embedding_bits=4)] + 4096


def test_bad_input_is_refused():
    for settings, message in (
        ({"embedding_block_size": 32}, "for tables of 4 bits"),
        ({"embedding_bits": 4, "embedding_block_size": 48}, "multiple of 32"),
        ({"embedding_bits": 4, "embedding_block_size": 32, "activations": None}, "are rounded"),
    ):
        with pytest.raises(ValueError, match=message):
            Int4(**settings)
    layer = keras.layers.ReversibleEmbedding(10, 48)
    layer.build()
    with pytest.raises(ValueError, match=r"which is 48. Received.*none do"):
        tfgptopt.quantize_aware(layer, BLOCKS)


def test_training_moves_scales_of_blocks():
    model = make("Llama3", hidden_dim=64, num_layers=1)
    spec = Int4(None, 4, "learned", activation_blocks=4, embedding_block_size=32)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (8, 13), np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((8, 12), np.int32)}
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = QuantizationAwareTraining(spec)
    before = model.fit(inputs, tokens[:, 1:], verbose=0, callbacks=[callback]).history["loss"][0]
    (scale,) = quantizers_of(model.backbone.token_embedding)[0].snapshot()
    history = model.fit(inputs, tokens[:, 1:], epochs=8, verbose=0, callbacks=[callback]).history
    (moved,) = quantizers_of(model.backbone.token_embedding)[0].snapshot()
    assert scale.shape == (2, 1, VOCABULARY)
    assert (moved != scale).mean() > 0.9
    assert history["loss"][-1] < 0.99 * before
