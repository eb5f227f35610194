import keras
import keras_hub
import numpy as np
import pytest
from conftest import make_gpt, random_batch

from tfgptopt.model.targets import select
from tfgptopt.quantization import Int8
from tfgptopt.quantization.balancing import balance
from tfgptopt.quantization.smoothing import find_pairs

SHAPE = {
    "vocabulary_size": 300,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 64,
}


def make_llama():
    return keras_hub.models.LlamaBackbone(**SHAPE)


def make_gemma():
    return keras_hub.models.GemmaBackbone(**SHAPE, head_dim=8)


def make_opt():
    return keras_hub.models.OPTBackbone(
        vocabulary_size=300, num_layers=2, num_heads=4, hidden_dim=32, intermediate_dim=64,
        dropout=0.0, max_sequence_length=16,
    )  # fmt: skip


def names(pair):
    producer = getattr(pair.producer, "path", "")
    return producer.split("/")[-2:], sorted(c.path.split("/")[-2] for c in pair.consumers)


@pytest.mark.parametrize(("make", "count"), [(make_llama, 8), (make_gemma, 8), (make_opt, 8)])
def test_places_are_found_in_every_family_and_nothing_changes(make, count):
    model = make()
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(generator.uniform(0.5, 1.5, weight.shape))
    inputs = random_batch(rows=2)[0]
    pairs = find_pairs(model, select(model), inputs)
    # Norm to attention, norm to feed-forward, value to output, up to down: in both layers.
    assert len(pairs) == count, [names(pair) for pair in pairs]
    expected = np.asarray(model(inputs))
    for pair in pairs:
        pair.fold(generator.uniform(0.2, 5.0, pair.features).astype(np.float32))
    np.testing.assert_allclose(model(inputs), expected, atol=2e-4)


def test_a_function_between_two_products_forbids_it():
    pairs = find_pairs(gpt := make_gpt(), select(gpt), random_batch(rows=2)[0])
    found = [names(pair)[1] for pair in pairs]
    # GELU stands between the two products of the feed-forward network.
    assert ["feedforward_output_dense"] not in found
    assert found.count(["attention_output"]) == 2 and len(found) == 6


def test_what_reads_a_norm_beside_the_targets_forbids_it():
    inputs = keras.Input((8,))
    x = keras.layers.LayerNormalization()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4)(x) + keras.layers.Dense(4)(x))
    data = np.random.default_rng(0).normal(0, 1, (16, 8)).astype(np.float32)
    assert len(find_pairs(model, select(model), data)) == 1
    only_one = select(model, lambda t: t is not None and t.path == select(model)[0].path)
    reads_too = find_pairs(model, only_one, data)
    # What the other product gives is not watched here, but the sum is not the same.
    assert reads_too == []


@pytest.mark.parametrize("kind", ["awq", "smoothquant"])
def test_balancing_helps_where_one_feature_is_large(kind):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((64,)), keras.layers.LayerNormalization(), keras.layers.Dense(32),
    ])  # fmt: skip
    gamma = np.ones(64, np.float32)
    gamma[5] = 60.0
    model.layers[0].gamma.assign(gamma)
    kernel = model.layers[1].kernel.numpy()
    kernel[5] /= 60.0
    model.layers[1].kernel.assign(kernel)
    data = np.random.default_rng(0).normal(0, 1, (256, 64)).astype(np.float32)
    exact = np.asarray(model(data))

    def error():
        import tfgptopt

        tfgptopt.quantize_aware(model, Int8())
        found = np.abs(np.asarray(model(data)) - exact).mean()
        tfgptopt.finalize(model)
        return found

    weights = model.get_weights()
    plain = error()
    model.set_weights(weights)
    pairs = find_pairs(model, select(model), data)
    balance(model, [(t, Int8()) for t in select(model)], pairs, data, kind)
    np.testing.assert_allclose(model(data), exact, atol=1e-4)
    assert error() < 0.4 * plain
