import dataclasses
import os
import signal

import keras
import keras_hub
import numpy as np
import pytest
from conftest import make_gpt, random_batch

from tfgptopt.data import load_preset
from tfgptopt.distillation import HiddenStates
from tfgptopt.distillation.technique import Distill
from tfgptopt.job.optimizing import check_fit, check_recipe, optimize
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity, Prune
from tfgptopt.quantization import Int4, Int8
from tfgptopt.quantization.quantizers import quantizers_of
from tfgptopt.recipe import QuantizeAware, Recipe, recipes
from tfgptopt.shrinking.technique import Shrink
from tfgptopt.training.planning import Training, compile_model


def test_model_and_text_must_fit_together(corpus):
    check_fit(make_gpt(corpus.tokenizer.vocabulary_size()), corpus)
    with pytest.raises(ValueError, match=r"tokenizer has 300 tokens, and the model's .* only 299"):
        check_fit(make_gpt(299), corpus)
    longer = dataclasses.replace(corpus, sequence_length=33)
    with pytest.raises(ValueError, match="window has 33 tokens, and the model only 32"):
        check_fit(make_gpt(300), longer)
    llama = keras_hub.models.LlamaCausalLM(
        keras_hub.models.LlamaBackbone(300, 1, 2, 8, 16, 1), preprocessor=None
    )
    check_fit(llama, corpus)
    mixture = keras_hub.models.MixtralBackbone(300, 1, 2, 8, 16, 1, num_experts=2)
    check_fit(keras_hub.models.MixtralCausalLM(mixture, preprocessor=None), corpus)
    with pytest.raises(ValueError, match="there is no reader for BertBackbone"):
        check_fit(keras_hub.models.BertBackbone(300, 1, 2, 8, 16), corpus)


STAGES = """
techniques:
- name: shrink
  depth: 1
  feedforward: 0.5
- name: distill
  steps: 4
  losses:
  - {name: logits_kl, temperature: 2.0}
  - {name: hard_labels, weight: 0.5}
- name: prune
  schedule: {name: constant_sparsity, target_sparsity: 0.5, begin_step: 2, frequency: 2}
- name: quantize_aware
  spec: {name: int8}
"""


def test_a_recipe_shrinks_distills_prunes_and_rounds(corpus, tmp_path):
    (tmp_path / "recipe.yaml").write_text(STAGES, "utf-8")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    before = model.get_weights()
    training = Training(0, 6, 1e-3, dense_run=False)
    compile_model(model, training)
    out = tmp_path / "out"
    outcome = optimize(model, corpus, recipe, training, out)
    names = ["dense Keras", "dense TFLite", "shrunk TFLite", "distilled TFLite"]
    assert [r.name for r in outcome.results] == [*names, "optimized Keras", "optimized TFLite"]
    sizes = [r.size.parameters for r in outcome.results]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] == sizes[5]
    assert list(outcome.curves) == ["distilled", "optimized"]
    losses = [result.loss for result in outcome.results]
    assert losses[2] != losses[3] != losses[5]
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)  # The teacher is left alone.
    reloaded = keras_hub.models.CausalLM.from_preset(str(out / "model"))
    assert reloaded.backbone.num_layers == 1 and reloaded.backbone.intermediate_dim == 32
    again = Recipe.load(out / "recipe.yaml")
    assert again.to_config() == recipe.to_config()
    assert again.replay(reloaded) is reloaded
    assert set(outcome.sparsity) == {t.path for t in select(reloaded)}
    page = (out / "report.html").read_text("utf-8")
    assert "distilled TFLite" in page and "times smaller than dense Keras" in page
    for name in ("model", "dense", "shrunk", "distilled"):
        assert (out / f"{name}.tflite").is_file()


def test_the_named_recipe_of_4_bits_rotates_teaches_and_rounds(corpus, tmp_path):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor, layers=1)
    training = Training(0, 6, 1e-3, dense_run=False)
    compile_model(model, training)
    out = tmp_path / "out"
    outcome = optimize(model, corpus, recipes.int4(), training, out)
    assert list(outcome.curves) == ["optimized"]  # No stage of teaching alone.
    dense, keras_, file = (outcome.results[i].loss for i in (0, -2, -1))
    assert file == pytest.approx(keras_, abs=1e-3) and file < dense + 0.3
    reloaded = load_preset(out / "model")
    Recipe.load(out / "recipe.yaml").replay(reloaded)
    inputs = random_batch()[0]
    # The scales that were learned come back: rounding moves no weight that training rounded.
    for one, other in zip(reloaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    quantizers = [q for x in reloaded._flatten_layers() for q in quantizers_of(x)]
    assert len(quantizers) == len(select(reloaded, None, ("kernel", "embedding")))
    for quantizer in quantizers:
        weights = quantizer.variable.value
        np.testing.assert_array_equal(quantizer.fake_quantize(weights), weights)
    # `optimize` finalized it: only what turns is dressed, and what is reloaded rounds besides.
    QuantizeAware(Int4(block_size=32, scale="learned")).replay(model)
    np.testing.assert_allclose(reloaded(inputs), model(inputs), atol=1e-4)
    training = Training(0, 6, 1e-3, False, lora=2)
    with pytest.raises(ValueError, match=r"rotate.*cannot train LoRA adapters alone"):
        optimize(model, corpus, recipes.int4(), training, tmp_path / "other")


def test_shrinking_alone_is_a_job_too(corpus, tmp_path):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    recipe = Recipe((Shrink(depth=1), Distill(2)))
    outcome = optimize(model, corpus, recipe, Training(0, 1, 1e-3, False), tmp_path / "out")
    names = [result.name for result in outcome.results]
    assert names[2:] == ["shrunk TFLite", "optimized Keras", "optimized TFLite"]
    assert list(outcome.curves) == ["distilled"]


def test_recipes_of_one_stage_and_of_budgets_are_fine(corpus):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    for techniques in (
        (Distill(9),),
        (Distill(9), QuantizeAware(Int8())),
        (Shrink(parameters=0.6), Distill(9)),
    ):
        check_recipe(model, corpus, Recipe(techniques))


def test_bad_jobs_touch_nothing(corpus, tmp_path):
    with pytest.raises(ValueError, match="`steps` >= 1"):
        Training(0, 0, 1e-3)
    existing = tmp_path / "out"
    existing.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        optimize(make_gpt(300), corpus, Recipe(), Training(0, 1, 1e-3), existing)
    assert list(existing.iterdir()) == []
    with pytest.raises(ValueError, match="no technique"):
        optimize(make_gpt(300), corpus, Recipe(), Training(0, 1, 1e-3), tmp_path / "new")
    typo = Recipe((QuantizeAware(Int8(), targets="typo"),))
    with pytest.raises(ValueError, match="matches none"):
        optimize(make_gpt(300), corpus, typo, Training(0, 1, 1e-3), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        ((Shrink(depth=9),), "depth=2; it can be shrunk"),
        ((Shrink(vocabulary=0.5),), "cannot shrink the vocabulary"),
        ((Distill(None),), "needs `steps`"),
        ((Shrink(depth=1), Distill(9, (HiddenStates({1: 1}),))), "layer"),
        ((Shrink(feedforward=40), QuantizeAware(Int4(block_size=32))), "must divide the inputs"),
        ((Shrink(depth=1), QuantizeAware(Int8(), targets="transformer_layer_1")), "matches none"),
        ((Shrink(context=8), QuantizeAware(Int8())), "only 8"),
    ],
    ids=["depth", "vocabulary", "steps", "losses", "block_size", "targets", "positions"],
)
def test_what_does_not_fit_a_later_stage_is_found_before_training(
    techniques, message, corpus, tmp_path, monkeypatch
):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    training = Training(0, 2, 1e-3)
    compile_model(model, training)
    monkeypatch.setattr(keras.Model, "fit", lambda *arguments, **settings: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        optimize(model, corpus, Recipe(techniques), training, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_job_that_is_stopped_goes_on_in_the_middle_of_its_last_stage(
    corpus, tmp_path, monkeypatch
):
    from tfgptopt.job import optimizing, stages

    def measure(job, dense, recipe, strategy, folder, files):
        return [*dense.get_weights(), *job.model.get_weights()], job.curves

    monkeypatch.setattr(optimizing, "_measure_and_write", measure)
    schedule = ConstantSparsity(0.5, begin_step=2, frequency=2)
    recipe = Recipe((Shrink(depth=1), Prune(schedule), QuantizeAware(Int8())))

    def run(out, steps_until_sigterm=None, **options):
        class Progress(stages.TrainingProgress):
            left = steps_until_sigterm

            def on_train_batch_end(self, batch, logs=None):
                super().on_train_batch_end(batch, logs)
                Progress.left = Progress.left and Progress.left - 1
                if Progress.left == 0:
                    os.kill(os.getpid(), signal.SIGTERM)

        keras.utils.set_random_seed(5)
        model = make_gpt(corpus.tokenizer.vocabulary_size())
        training = Training(2, 4, 1e-3)
        compile_model(model, training)
        with monkeypatch.context() as patch:
            patch.setattr(stages, "TrainingProgress", Progress)
            return optimize(model, corpus, recipe, training, out, **options)

    weights, curves = run(tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        run(out, 2 + 4 + 3)  # Of the shared steps, dense, optimized.
    assert ended.value.code == 75
    assert {path.name for path in (tmp_path / "out.checkpoints").iterdir()} == {
        "dense-shared part", "dense", "optimized"
    }  # fmt: skip
    with pytest.raises(FileExistsError, match=r"holds a job that was stopped.*--resume"):
        run(out)
    resumed, shown = run(out, resume=True)
    for one, other in zip(resumed, weights, strict=True):
        np.testing.assert_array_equal(one, other)
    for name, points in curves.items():
        np.testing.assert_allclose(shown[name], points, rtol=1e-5)
    assert not (tmp_path / "out.checkpoints").exists()
