import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch
from decoder.families import CONTEXT, FAMILIES, VOCABULARY, logits, make, prompt

import tfgptopt
from tfgptopt.calibration.watching import observe_all
from tfgptopt.data import load_preset, load_weights
from tfgptopt.decoder import read_decoder
from tfgptopt.exporting import TFLite
from tfgptopt.model.cloning import clone
from tfgptopt.model.history import history_of
from tfgptopt.model.orthogonal import hadamard, orthogonal
from tfgptopt.model.targets import target_of
from tfgptopt.model.turning import Turn, is_turned
from tfgptopt.quantization import Int4, Int8, Rotate, rotate
from tfgptopt.quantization.rotatable import rotatable
from tfgptopt.quantization.turned_weights import fold_norm, turn_stream, turn_values
from tfgptopt.recipe import QuantizeAware, Recipe, recipe_of

TEXT = prompt(40)


def moved(model, expected):
    """Returns by how much logits moved, as a share of how far they spread."""
    found = np.asarray(logits(model, TEXT), np.float32)
    return np.abs(found - expected).max() / expected.std()


def windows(count=4, length=64):
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (count, length), np.int32)
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 48, 60, 76, 88, 576, 640, 768])
def test_hadamard_matrices(size):
    matrix = hadamard(size)
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size))


@pytest.mark.parametrize("size", [1, 3, 30, 52, 64])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_orthogonal_matrices_for_any_width(size, keeps_mean):
    matrix = orthogonal(size, 5, keeps_mean)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    if keeps_mean:
        np.testing.assert_allclose(np.ones(size) @ matrix, np.ones(size), atol=1e-5)
    if size > 3:
        # No feature stays where it is: each becomes a mixture of all.
        assert np.abs(matrix).max() < 0.9
        assert np.abs(matrix - orthogonal(size, 6, keeps_mean)).max() > 0.1
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1


@pytest.mark.parametrize("name", FAMILIES)
def test_in_floats_nothing_changes(name):
    model = make(name)
    expected, before = logits(model, TEXT), model.get_weights()
    rotate(model, Rotate(down=8))
    assert moved(model, expected) < 1e-4
    assert any(np.abs(a - b).max() > 0.05 for a, b in zip(model.get_weights(), before, strict=True))
    assert any(is_turned(layer) for layer in model._flatten_layers())


@pytest.mark.parametrize("name", ["OPT", "GPTNeoX", "Llama3", "Phi3"])
def test_turning_there_and_back_is_the_identity(name):
    model = make(name)
    found = rotatable(model)
    for branch in found.branches:
        fold_norm(branch, found.norm_offset)
    before, stream = model.get_weights(), Turn(found.width, 0, found.keeps_mean)
    turn_stream(found, stream)
    between = model.get_weights()
    turn_stream(found, stream.inverse)
    for values in found.values:
        turn_values(values, Turn(values.head_dim, 1))
        turn_values(values, Turn(values.head_dim, 1).inverse)
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(now, was, atol=1e-5)
    assert any(np.abs(a - b).max() > 0.05 for a, b in zip(between, before, strict=True))


@pytest.mark.parametrize("name", ["GPT2", "Bloom", "Gemma 3"])
def test_file_computes_what_the_rotated_model_computes(name, tmp_path):
    model = rotate(make(name), Rotate(down=8))
    path = tfgptopt.export(model, tmp_path / "gpt.tflite", TFLite(CONTEXT))
    engine = tfgptopt.TFLiteCausalLM(path)._engine
    found = engine.score(engine.new_cache(), TEXT)
    np.testing.assert_allclose(found, logits(model, TEXT), atol=1e-4, rtol=0)


def multiply(norm, factors, offset):
    variable = norm.gamma if hasattr(norm, "gamma") else norm.scale
    variable.assign((variable.numpy() + offset) * factors - offset)


def with_large_features(name):
    """Returns a model with two features that are 100 times as large in front of products; where
    the stream cannot be turned, in its table.
    """
    model = make(name)
    found = rotatable(model)
    factors = np.ones(found.width, np.float32)
    factors[[3, 17]] = 100.0
    for branch in found.branches:
        if not found.is_free:
            multiply(branch.norm, 1 / factors, found.norm_offset)
            continue
        multiply(branch.norm, factors, found.norm_offset)
        for target in branch.readers:
            matrix = target.to_matrix(target.variable.value).numpy() / factors[:, np.newaxis]
            target.variable.assign(target.from_matrix(matrix))
    if not found.is_free:
        table = found.table.embeddings
        table.assign(table.numpy() * factors)
        multiply(found.final_norm, 1 / factors**2, found.norm_offset)
    return model


@pytest.mark.parametrize("name", ["GPT2", "Llama3", "Gemma 2"])
def test_large_features_cost_nothing_once_they_are_turned(name):
    expected = logits(with_large_features(name), TEXT)
    errors = {}
    for method in ("rtn", "rotation"):
        model = tfgptopt.quantize(with_large_features(name), Int8(), method)
        errors[method] = np.abs(logits(model, TEXT) - expected).mean() / expected.std()
    assert errors["rotation"] < 0.15 * errors["rtn"]


def test_large_columns_are_found_and_come_back():
    model = with_large_features("Gemma 2")
    expected = logits(model, TEXT)
    rotate(model)
    assert moved(model, expected) < 1e-4
    (technique,) = recipe_of(model).techniques
    assert [column for column, _ in technique.large] == [3, 17]
    assert {power for _, power in technique.large} <= {6, 7}  # Of 100.
    again = make("Gemma 2")
    again.set_weights(model.get_weights())
    Rotate.from_config({k: v for k, v in technique.to_config().items() if k != "name"}).replay(
        again
    )
    assert moved(again, expected) < 1e-4
    with pytest.raises(ValueError, match="pairs of ints"):
        Rotate(large=((3, "7"),))


@pytest.mark.parametrize("name", ["Llama3", "Gemma 2"])
def test_auto_rotates_where_it_can(name):
    model = tfgptopt.quantize(make(name), Int8(), "auto")
    assert any(isinstance(one, Rotate) for one in history_of(model))
    part = tfgptopt.quantize(make(name), Int8(), "auto", targets="feedforward|ffw")
    model = make(name)
    model.backbone.token_embedding.trainable = False
    for plain in (part, tfgptopt.quantize(model, Int8(), "auto")):
        assert not history_of(plain)


def test_methods_behind_rotation_see_turned_features():
    model = rotate(make("Llama"), Rotate(down=16))
    down = target_of(model.backbone.transformer_layers[0]._feedforward_output_dense)
    seen, given = [], []
    plain = type(down.layer).call

    observe_all(model, [down], windows(1), lambda _, rows: seen.append(rows.numpy()))
    product = seen[0] @ down.to_matrix(down.variable.value).numpy()
    down.layer.call = lambda x: given.append(plain(down.layer, x)) or given[-1]
    model(windows(1))
    np.testing.assert_allclose(product, given[0].numpy().reshape(product.shape), atol=1e-4)


def test_gptq_behind_rotation_is_better_than_either():
    data, errors = windows(16), {}
    expected = logits(make("Llama"), TEXT)
    for method in ("gptq", "rotation", ("rotation", "gptq")):
        model = tfgptopt.quantize(make("Llama"), Int4(), method, data)
        errors[method] = np.abs(logits(model, TEXT) - expected).mean()
    assert errors["rotation", "gptq"] < min(errors["gptq"], errors["rotation"])


@pytest.mark.parametrize("name", ["GPT2", "Gemma 2"])
def test_weights_and_recipe_come_back(name, tmp_path):
    model = tfgptopt.quantize(make(name), Int8(), (Rotate(seed=3, down=8), "mse"))
    expected = logits(model, TEXT)
    recipe = recipe_of(model)
    assert recipe.techniques == (Rotate(seed=3, down=8, large=()), QuantizeAware(Int8()))
    tfgptopt.finalize(model)
    assert recipe_of(model) == recipe
    recipe.save(tmp_path / "recipe.yaml")
    model.save_weights(tmp_path / "model.weights.h5")
    again = make(name)
    with pytest.raises(ValueError, match="could not be loaded"):  # A plain model says so.
        make(name).load_weights(tmp_path / "model.weights.h5")
    load_weights(again, tmp_path / "model.weights.h5")
    np.testing.assert_allclose(logits(again, TEXT), logits(model, TEXT), atol=1e-5)
    Recipe.load(tmp_path / "recipe.yaml").replay(again)
    np.testing.assert_array_equal(logits(again, TEXT), expected)
    assert recipe_of(again) == recipe
    for matrix, other in zip(
        read_decoder(model).matrices(), read_decoder(again).matrices(), strict=True
    ):
        np.testing.assert_array_equal(matrix.values, other.values)


def test_presets_come_back_turned_and_floats_are_refused(tmp_path):
    model = make("Llama")
    model.save_weights(tmp_path / "float.weights.h5")
    rotate(model)
    model.save_to_preset(str(tmp_path / "rotated"))
    with pytest.raises(ValueError, match="could not be loaded"):
        keras_hub.models.CausalLM.from_preset(str(tmp_path / "rotated"))
    again = load_preset(tmp_path / "rotated")
    np.testing.assert_allclose(logits(again, TEXT), logits(model, TEXT), atol=1e-5)
    assert sum(map(is_turned, again._flatten_layers())) > 0
    with pytest.raises(ValueError, match="of a model that was not rotated"):
        model.load_weights(tmp_path / "float.weights.h5")
    with pytest.raises(ValueError, match="rotated otherwise"):
        other = rotate(make("Llama"), Rotate(seed=7))
        other.save_weights(tmp_path / "other.weights.h5")
        model.load_weights(tmp_path / "other.weights.h5")


def test_a_copy_turns_what_the_model_turns():
    model = rotate(make("Llama3"))
    np.testing.assert_allclose(logits(clone(model), TEXT), logits(model, TEXT), atol=1e-5)


def test_fit_trains_on():
    model = tfgptopt.quantize(make_gpt(), Int8(), "rotation")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss, sampler="greedy")
    inputs, labels = random_batch()
    first = model.fit(inputs, labels, epochs=20, verbose=0).history["loss"]
    assert first[-1] < first[0] - 1.0
    gain = model.backbone.layer_norm.gamma.numpy()
    assert np.abs(gain - 1).max() > 1e-3  # The final norm's own factors train.


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_models_of_16_bits_turn_too(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = make("Llama3")
        expected = np.asarray(logits(model, TEXT), np.float32)
        rotate(model)
    finally:
        keras.config.set_dtype_policy("float32")
    assert moved(model, expected) < 0.3


def masked(model):
    tfgptopt.prune(model, 0.5, targets="feedforward")


def frozen(model):
    model.backbone.transformer_layers[0].trainable = False


def shared(model):
    first, second = model.backbone.transformer_layers
    norm = first._self_attention_layer_norm
    object.__setattr__(second, "_self_attention_layer_norm", norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (masked, "prune after rotation"),
        (frozen, "frozen"),
        (lambda model: model.backbone.enable_lora(2), "LoRA|frozen"),
        (lambda model: tfgptopt.quantize_aware(model, Int8()), "quantize-aware already|rounded"),
        (shared, "several places"),
        (rotate, "rotated already"),
    ],
)
def test_what_cannot_be_turned_is_refused_before_anything_changes(change, message):
    model = make_gpt()
    change(model)
    before, history = [v.numpy() for v in model.variables], history_of(model)
    with pytest.raises(ValueError, match=message):
        tfgptopt.quantize(model, Int8(), "rotation")
    for was, now in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(was, now.numpy())
    assert history_of(model) == history


def test_other_models_are_refused_with_the_reason():
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="no layout of Sequential"):
        rotate(model)
    moe = keras_hub.models.MixtralBackbone(
        vocabulary_size=30, num_layers=1, num_query_heads=2, num_key_value_heads=1,
        hidden_dim=16, intermediate_dim=16, num_experts=2, top_k=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="mixture of experts"):
        rotate(moe)
    seeing = make("Gemma 3")
    object.__setattr__(seeing.backbone, "vision_encoder", keras.layers.Identity())
    with pytest.raises(ValueError, match="more than text, through its `vision_encoder`"):
        rotate(seeing)
    with pytest.raises(ValueError, match="`seed` must be"):
        Rotate(seed=-1)
    with pytest.raises(ValueError, match="`down` must be"):
        Rotate(down=1)
    with pytest.raises(ValueError, match="Shrink first, then rotate"):
        tfgptopt.shrink(rotate(make("GPT2")), depth=1, calibration=[windows(1)])


def test_what_fails_behind_rotation_leaves_the_model_as_it_was():
    model = make("Llama")
    before, expected = model.get_weights(), logits(model, TEXT)
    with pytest.raises(ValueError, match="too little"):
        tfgptopt.quantize(model, Int8(), ("rotation", "gptq"), windows(1, 8))
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    assert not history_of(model)
    np.testing.assert_array_equal(logits(model, TEXT), expected)


def test_layer_that_reads_the_stream_unknown_to_the_layout_is_noticed(monkeypatch):
    model = make_gpt()
    final = model.backbone.layer_norm
    plain = type(final).call
    # As if a bias of the user's own were added to features one by one.
    monkeypatch.setattr(
        type(final), "call", lambda self, x, *a, **k: plain(self, tf.nn.relu(x), *a, **k)
    )
    before = model.get_weights()
    with pytest.raises(ValueError, match="does not tell of"):
        rotate(model)
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
