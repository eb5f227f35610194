"""Leaving out experts of mixtures."""

import keras
import keras_hub
import numpy as np
import pytest
from decoder.families import VOCABULARY, randomize
from exporting import test_mixtures as exported

import tfgptopt
from tfgptopt.families.mixtures import experts_of
from tfgptopt.model.experts import open_experts
from tfgptopt.model.overriding import overriding
from tfgptopt.quantization import Int8
from tfgptopt.recipe import Shrink
from tfgptopt.shrinking.experts import routed

MIXTURES = {
    **exported.MIXTURES,
    "GptOss": {**exported.GROUPED, "top_k": 2, "head_dim": 16, "sliding_window": 8},
}
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9), np.int32)
MASK = np.ones((2, 9), np.int32)
MASK[1, 6:] = 0
DATA = {"token_ids": TOKENS, "padding_mask": MASK}


def make(name):
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**MIXTURES[name])
    model = getattr(keras_hub.models, f"{name}CausalLM")(backbone, preprocessor=None)
    randomize(model)
    return model


def read_by_routers(model):
    """Returns what each router reads of real tokens, in float64."""
    rows = {}

    def noting(router):
        call = router.call

        def noted(inputs, *args, **kwargs):
            flat = keras.ops.convert_to_numpy(inputs).reshape(-1, 32)
            rows[id(router)] = flat[MASK.ravel() > 0].astype(np.float64)
            return call(inputs, *args, **kwargs)

        return noted

    found = experts_of(model.backbone)
    with overriding([(one.router, "call", noting(one.router)) for one in found]):
        model.backbone(DATA)
    return [rows[id(one.router)] for one in found]


def logits_of(model):
    return keras.ops.convert_to_numpy(model(DATA, training=False))[MASK > 0]


def let_no_token_reach(model, dead):
    """Turns the routers away from some experts, for the tokens of `DATA`."""
    for layer, one in enumerate(experts_of(model.backbone)):
        rows = read_by_routers(model)[layer]
        away = np.linalg.lstsq(rows, np.full(len(rows), -100.0), rcond=None)[0]
        kernel = one.router.get_weights()[0]
        kernel[:, dead] = away[:, None]
        one.router.kernel.assign(kernel)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_no_token_reaches_go_without_a_trace(name):
    model = make(name)
    let_no_token_reach(model, [1, 3])
    before = logits_of(model)
    small = tfgptopt.shrink(model, experts=3, calibration=DATA, verbose=0)
    assert small.backbone.num_experts == 3 and type(small) is type(model)
    np.testing.assert_allclose(logits_of(small), before, atol=1e-5)
    np.testing.assert_array_equal(logits_of(model), before)
    assert small.count_params() < model.count_params()


def test_shares_are_those_of_a_plain_computation():
    model = make("Mixtral")
    for rows, one, share in zip(
        read_by_routers(model), experts_of(model.backbone), routed(model, DATA), strict=True
    ):
        logits = rows @ one.router.get_weights()[0].astype(np.float64)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        best = np.argsort(-chances, axis=1)[:, :2]
        expected = np.zeros(5)
        for row, chosen in zip(chances, best, strict=True):
            expected[chosen] += row[chosen]
        np.testing.assert_allclose(share, expected / expected.sum(), atol=1e-5)


def test_an_opened_mixture_shrinks_exports_and_remembers(tmp_path):
    model = make("Qwen3Moe")
    for layer in model._flatten_layers():
        open_experts(layer)
    small = tfgptopt.shrink(model, experts=0.6, calibration=DATA, verbose=0)
    assert small.backbone.num_experts == 3
    tfgptopt.quantize(small, Int8(), verbose=0)
    path = tfgptopt.export(small, tmp_path / "small.tflite", verbose=0)
    prompt = [3, 5, 7]
    lm = tfgptopt.TFLiteCausalLM(path)
    assert len(lm.generate(prompt, max_length=8, stop=None)) == 8
    assert lm.metadata.recipe["techniques"][0]["experts"] == 0.6


def test_what_cannot_be_left_out_is_refused(gpt):
    model = make("Mixtral")
    with pytest.raises(ValueError, match="2 experts compute each token"):
        tfgptopt.shrink(model, experts=1, calibration=DATA)
    with pytest.raises(ValueError, match=r"experts and depth"):
        tfgptopt.shrink(model, experts=3, depth=1, calibration=DATA)
    with pytest.raises(ValueError, match="model has experts=5"):
        tfgptopt.shrink(model, experts=6, calibration=DATA)
    with pytest.raises(ValueError, match="no mixture"):
        tfgptopt.shrink(gpt, experts=2, calibration=DATA)
    with pytest.raises(ValueError, match="calibration"):
        tfgptopt.shrink(model, experts=3)
    assert Shrink.from_config({"experts": 3}).settings()["experts"] == 3
    for one in experts_of(model.backbone):
        one.router.trainable = False
    with pytest.warns(UserWarning, match="Routers of this mixture are frozen"):
        tfgptopt.shrink(model, experts=3, calibration=DATA, verbose=0)
