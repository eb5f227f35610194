"""The experts of mixtures are targets: the same numbers, variables and checkpoints as before."""

import keras
import keras_hub
import numpy as np
import pytest
from decoder.families import logits, prompt, randomize
from keras_hub.src.models.gpt_oss.gpt_oss_decoder import GptOssExperts
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts
from keras_hub.src.models.qwen3_5_moe.qwen3_5_moe_decoder import Qwen3_5MoeExperts
from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import Qwen3MoeExperts
from keras_hub.src.models.qwen_moe.qwen_moe_decoder import QwenMoeExperts

import tfgptopt
from tfgptopt.families.mixtures import experts_of
from tfgptopt.model.experts import open_experts
from tfgptopt.model.targets import select, walk
from tfgptopt.quantization import Int8


def make_mixture():
    backbone = keras_hub.models.MixtralBackbone(211, 1, 4, 32, 48, 2, num_experts=4, top_k=2)
    model = keras_hub.models.MixtralCausalLM(backbone, preprocessor=None)
    randomize(model)
    return model


def kernels_of(model):
    return [weight for weight in model.weights if "/experts/" in weight.path]


@pytest.mark.parametrize(
    "bank_class",
    [GptOssExperts, MixtralMoeExperts, Qwen3_5MoeExperts, Qwen3MoeExperts, QwenMoeExperts],
)
def test_a_bank_computes_the_same_through_its_products(bank_class):
    bank = bank_class(num_experts=3, hidden_dim=8, intermediate_dim=12)
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    bank.build(rows.shape)
    randomize(bank)
    before, weights = np.asarray(bank(rows)), [id(weight) for weight in bank.weights]
    known = open_experts(bank)
    assert known == open_experts(bank) == {id(w) for w in bank.weights if len(w.shape) == 3}
    assert [id(weight) for weight in bank.weights] == weights
    np.testing.assert_allclose(np.asarray(bank(rows)), before, atol=1e-5)
    bank.expert_products[-1]._kernel.assign(0 * bank.expert_products[-1]._kernel)
    assert not np.allclose(np.asarray(bank(rows)), before)


def test_experts_are_targets_with_an_axis_of_their_own():
    model = make_mixture()
    targets = {target.path: target for target in select(model)}
    kernels = kernels_of(model)
    assert len(kernels) == 3
    for kernel in kernels:
        target = targets[kernel.path]
        assert (target.expert_axis, target.role) == (0, "kernel")
        assert target.matrix_shape == (kernel.shape[1], 4 * kernel.shape[2])
    assert all(t.expert_axis is None for path, t in targets.items() if "/experts/" not in path)
    assert not [item for item in walk(model) if "experts" in item.path and hasattr(item, "reason")]


def test_experts_are_pruned_and_rounded_with_a_scale_for_each_output_of_each():
    model = make_mixture()
    tfgptopt.prune(model, 0.5)
    pruned = [kernel.numpy() for kernel in kernels_of(model)]
    tfgptopt.quantize(model, Int8())
    tfgptopt.finalize(model)
    for kernel, before in zip(kernels_of(model), pruned, strict=True):
        assert (before == 0).mean() == pytest.approx(0.5, abs=0.01)
        scale = np.abs(before).max(axis=1, keepdims=True) / 127
        expected = np.round(before / scale) * scale
        steps = np.abs(kernel.numpy() - expected) / scale
        # A scale keeps 16 significant bits; what lies between two integers may fall either way.
        assert np.quantile(steps, 0.999) < 4e-3 and steps.max() < 1.01


def test_checkpoints_of_models_with_open_and_closed_experts_are_interchangeable(tmp_path):
    model, tokens = make_mixture(), prompt(20)
    expected = logits(model, tokens)
    model.save_weights(tmp_path / "closed.weights.h5")
    other = make_mixture()
    tfgptopt.quantize_aware(other, Int8(scale="mse"))
    for weight in other.weights:
        weight.assign(weight * 0)
    other.load_weights(tmp_path / "closed.weights.h5")
    rounded = logits(other, tokens)
    assert 0 < np.abs(rounded - expected).mean() < 0.2 * expected.std()
    other.save_weights(tmp_path / "dressed.weights.h5")
    fresh = make_mixture()
    for weight in fresh.weights:
        weight.assign(weight * 0)
    fresh.load_weights(tmp_path / "dressed.weights.h5")
    np.testing.assert_allclose(logits(fresh, tokens), expected, atol=1e-5)


def test_training_moves_experts_on_their_grid():
    model = make_mixture()
    tfgptopt.quantize_aware(model, Int8())
    before = [kernel.numpy() for kernel in kernels_of(model)]
    tokens = np.asarray([prompt(9, seed) for seed in range(4)])
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((4, 8), np.int32)}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True)
    model.fit(inputs, tokens[:, 1:], verbose=0)
    for kernel, old in zip(kernels_of(model), before, strict=True):
        assert np.abs(kernel.numpy() - old).max() > 1e-6


def test_adapters_of_experts_are_refused():
    model = make_mixture()
    chosen = [target for target in select(model) if target.expert_axis is not None]
    with pytest.raises(ValueError, match="take no LoRA adapters"):
        chosen[0].layer.enable_lora(2)


def test_the_router_of_qwen_3_5_is_found():
    backbone = keras_hub.models.Qwen3_5MoeBackbone(
        50, 1, 2, 1, 8, 16, 24, 16, num_experts=3, top_k=2, linear_num_key_heads=1,
        linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4,
    )  # fmt: skip
    (experts,) = experts_of(backbone)
    assert experts.router.kernel.shape == (16, 3) and experts.top_k == 2
    assert type(experts.bank).__name__ == "Qwen3_5MoeExperts"
