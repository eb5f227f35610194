import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining, from_recipe

import tfgptopt
from tfgptopt.decoder import read_decoder
from tfgptopt.distillation import HardLabels, HiddenStates, LogitsKL
from tfgptopt.distillation.technique import Distill
from tfgptopt.model.cloning import clone
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity, PolynomialDecay, Unstructured, Wanda
from tfgptopt.quantization import Int4, Int8
from tfgptopt.recipe import Prune, QuantizeAware, Recipe, Rotate, recipe_of, recipes
from tfgptopt.shrinking.technique import Shrink

RECIPE = Recipe(
    (
        Prune(PolynomialDecay(0.0, 0.5, 2, 6, frequency=2), targets="feedforward"),
        QuantizeAware(Int4(embedding_bits=4), start_step=1),
    )
)


def test_yaml_and_back(tmp_path):
    RECIPE.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again.to_config() == RECIPE.to_config()
    assert again.techniques[1] == RECIPE.techniques[1]


def test_callbacks_carry_it_out_and_a_model_tells_its_recipe():
    model = make_gpt()
    model.compile(optimizer="adam")
    callbacks = from_recipe(RECIPE)
    assert [type(c) for c in callbacks] == [Pruning, QuantizationAwareTraining]
    model.fit(*random_batch(rows=32), batch_size=4, verbose=0, callbacks=callbacks)
    found = recipe_of(model)
    assert found.techniques[1].spec == Int4(embedding_bits=4)
    pruned = {t.path for t in select(model, found.techniques[0].targets)}
    assert pruned == {t.path for t in select(model, "feedforward")}
    tfgptopt.finalize(model)
    assert recipe_of(model).to_config() == found.to_config()
    assert recipe_of(make_gpt()) is None


def test_calibration_data_reaches_the_scores_that_need_it():
    recipe = Recipe((Prune(ConstantSparsity(0.5, 0), Unstructured("output"), Wanda()),))
    model, expected = make_gpt(), make_gpt()
    expected.set_weights(model.get_weights())
    data = [random_batch(rows=4)[0]]
    with pytest.raises(ValueError, match="Wanda needs calibration data"):
        from_recipe(recipe)[0].set_model(model)
    (pruning,) = from_recipe(recipe, calibration=data)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    model.fit(*random_batch(), verbose=0, callbacks=[pruning])
    tfgptopt.prune(expected, 0.5, Unstructured("output"), Wanda(data))
    for ours, theirs in zip(select(model), select(expected), strict=True):
        np.testing.assert_array_equal(ours.variable, theirs.variable)


def test_a_reloaded_model_is_dressed_again_by_its_recipe(tmp_path):
    model = make_gpt()
    tfgptopt.prune(model, 0.5)
    tfgptopt.quantize_aware(model, Int8())
    recipe = recipe_of(model)
    inputs, _ = random_batch()
    expected = np.asarray(model(inputs))
    model.backbone.save_to_preset(str(tmp_path / "preset"))
    backbone = type(model.backbone).from_preset(str(tmp_path / "preset"))
    again = type(model)(backbone=backbone, preprocessor=None)
    assert np.abs(np.asarray(again(inputs)) - expected).max() > 1e-5
    recipe.replay(again)
    np.testing.assert_allclose(again(inputs), expected, atol=1e-6)
    again.compile(optimizer=keras.optimizers.Adam(1e-2))
    zeros = [t.variable.numpy() == 0 for t in select(again)]
    again.fit(*random_batch(), verbose=0)
    for target, zero in zip(select(again), zeros, strict=True):
        np.testing.assert_array_equal(target.variable.numpy() == 0, zero)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("techniques: [", "no valid recipe"),
        ("- prune", "mapping with a list of techniques"),
        ("techniques: [{name: melt}]", "quantize_aware or regularize"),
        ("techniques: [{name: prune}]", "needs the field 'schedule'"),
        ("techniques: [{name: quantize_aware, spec: {name: int2}}]", "named int8 or int4"),
        ("techniques: [{name: quantize_aware, spec: {name: int8, bits: 3}}]", "Unknown setting"),
        ("techniques: [{name: quantize_aware, spec: {name: int8}, x: 1}]", "'x'"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        Recipe.load(path)


def test_groups_with_their_own_settings_come_back(tmp_path):
    model = make_gpt()
    tfgptopt.quantize_aware(model, Int4(), "feedforward")
    tfgptopt.quantize_aware(model, Int8(), "attention")
    recipe = recipe_of(model)
    assert [technique.spec for technique in recipe.techniques] == [Int8(), Int4()]
    again = make_gpt()
    again.set_weights(model.get_weights())
    recipe.replay(again)
    inputs, _ = random_batch()
    np.testing.assert_allclose(again(inputs), model(inputs), atol=1e-6)


def test_a_technique_twice_is_refused():
    with pytest.raises(ValueError, match="each technique once"):
        Recipe((Prune(ConstantSparsity(0.5, 0)), Prune(ConstantSparsity(0.3, 0))))
    with pytest.raises(ValueError, match="Not a technique"):
        Recipe(("prune",))


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_a_reloaded_model_keeps_the_grid_that_its_weights_lie_on(method, tmp_path):
    model = make_gpt()
    inputs, _ = random_batch(16)
    tfgptopt.quantize(model, Int4(block_size=32), method, inputs)
    expected = np.asarray(model(inputs))
    stored = [matrix.floats() for matrix in read_decoder(model).matrices()]
    tfgptopt.finalize(model)
    recipe_of(model).save(tmp_path / "recipe.yaml")
    model.backbone.save_to_preset(str(tmp_path / "preset"))
    backbone = type(model.backbone).from_preset(str(tmp_path / "preset"))
    again = type(model)(backbone=backbone, preprocessor=None)
    Recipe.load(tmp_path / "recipe.yaml").replay(again)
    np.testing.assert_allclose(again(inputs), expected, atol=1e-5)
    for matrix, values in zip(read_decoder(again).matrices(), stored, strict=True):
        np.testing.assert_array_equal(matrix.floats(), values)


RAMP = keras.optimizers.schedules.PolynomialDecay(0.0, 10, end_learning_rate=1.0)
STAGES = Recipe(
    (
        Shrink(depth=0.5, feedforward=16),
        Distill(7, (LogitsKL(2.0, "reverse"), HiddenStates({0: 1}), HardLabels(RAMP))),
        *RECIPE.techniques,
    )
)


def test_stages_to_yaml_and_back(tmp_path):
    STAGES.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again.to_config() == STAGES.to_config()
    assert again.techniques[0] == STAGES.techniques[0]
    assert again.techniques[1].losses[:2] == STAGES.techniques[1].losses[:2]
    assert float(again.techniques[1].losses[2].weight(5)) == pytest.approx(float(RAMP(5)))
    assert again.in_fit.to_config() == RECIPE.to_config()
    with pytest.raises(ValueError, match="are no callbacks"):
        from_recipe(again)


def test_a_method_comes_back_from_yaml(tmp_path):
    recipe = Recipe((QuantizeAware(Int4(), method=["awq", "gptq"]),))
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_named_recipes_come_back_from_yaml(tmp_path):
    for name in recipes.names():
        recipe = recipes.named(name, steps=50)
        recipe.save(tmp_path / "recipe.yaml")
        assert Recipe.load(tmp_path / "recipe.yaml").to_config() == recipe.to_config()
    assert tfgptopt.recipes.int8().techniques == (Rotate(), QuantizeAware(Int8()))
    assert tfgptopt.recipes.int4(64).techniques[-1] == QuantizeAware(
        Int4(block_size=64, scale="learned"), method="gptq"
    )
    schedule = recipes.pruned_int8(0.4, steps=50).techniques[0].schedule
    assert (schedule.final_sparsity, schedule.end_step) == (0.4, 30)
    with pytest.raises(ValueError, match="named int8, int4, pruned_int8, small"):
        recipes.named("int3", 50)
    with pytest.raises(ValueError, match="`steps` must be"):
        recipes.pruned_int8(steps=0)


BAD_STAGES = {
    "order": ([{"name": "distill"}, {"name": "shrink", "depth": 1}], "shrinks first"),
    "twice": ([{"name": "distill"}, {"name": "distill"}], "each technique once"),
    "nothing": ([{"name": "shrink"}], "Give what to shrink"),
    "budget": ([{"name": "shrink", "depth": 1, "latency": 0.5}], "or one budget"),
    "shrink field": ([{"name": "shrink", "tokens": 0.5}], "unexpected keyword"),
    "steps": ([{"name": "distill", "steps": -1}], "int >= 0"),
    "seed": ([{"name": "rotate", "seed": -1}], "`seed` must be"),
    "losses": ([{"name": "distill", "losses": []}], "is empty"),
    "loss": ([{"name": "distill", "losses": [{"name": "mse"}]}], "A loss is named"),
    "field": (
        [{"name": "distill", "losses": [{"name": "logits_kl", "heat": 2}]}],
        "Unknown setting for logits_kl",
    ),
    "temperature": (
        [{"name": "distill", "losses": [{"name": "logits_kl", "temperature": 0}]}],
        "above 0",
    ),
}


@pytest.mark.parametrize("case", BAD_STAGES)
def test_bad_stages(case):
    techniques, message = BAD_STAGES[case]
    with pytest.raises(ValueError, match=message):
        Recipe.from_config({"techniques": techniques})


def test_a_function_is_no_yaml():
    with pytest.raises(ValueError, match="cannot hold a function"):
        Distill(1, (LogitsKL(weight=lambda step: 1.0),))


def test_adapters_alone_are_merged_and_those_beside_integers_refused():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Dense(6)(inputs)))
    for layer in model.layers[1:]:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.1))
    x = np.random.default_rng(0).normal(0, 1, (5, 8)).astype(np.float32)
    before, copied = np.asarray(model(x)), clone(make_gpt())
    tfgptopt.finalize(model)
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    assert not any(layer.lora_enabled for layer in model.layers[1:]) and copied.built
    with pytest.raises(ValueError, match="nothing to finalize"):
        tfgptopt.finalize(model)
    model.quantize("int8")
    model.layers[1].enable_lora(2)
    held = model.layers[1].get_weights()
    with pytest.raises(ValueError, match="was quantized by Keras"):
        tfgptopt.finalize(model)
    for old, new in zip(held, model.layers[1].get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_copy_of_a_model_with_adapters_computes_the_same():
    model = make_gpt()
    model.backbone.enable_lora(2)
    for weight in model.weights:
        if weight.path.endswith("lora_kernel_b"):
            weight.assign(np.full(weight.shape, 0.1))
    inputs = random_batch()[0]
    np.testing.assert_allclose(clone(model)(inputs), model(inputs), atol=1e-5)
