import dataclasses

import keras_hub
import pytest
from conftest import make_gpt

from tfgptopt.optimizing import Training, check_fit, optimize
from tfgptopt.quantization import Int8
from tfgptopt.recipe import QuantizeAware, Recipe


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
