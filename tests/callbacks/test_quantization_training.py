"""Quantization-aware training as users run it: learned and frozen scales, adapters, resume."""

import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch, two_replicas
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.decoder import read_decoder
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity
from tfgptopt.quantization import Int4, Int8, quantize_aware_layer
from tfgptopt.quantization.quantizers import quantizers_of

LEARNED = Int4(scale="learned")


def compiled(optimizer="adam", **options):
    model = make_gpt(layers=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, **options)
    return model


def fit(model, callbacks, steps=4, **kwargs):
    inputs, labels = random_batch(rows=4 * steps)
    model.fit(inputs, labels, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks, **kwargs)


def scales(model):
    targets = select(model, roles=("kernel", "embedding"))
    return {t.path: quantizers_of(t.layer)[0].kept.numpy() for t in targets}


def test_a_learned_scale_takes_the_step_of_plain_gradient_descent():
    layer = keras.layers.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile(optimizer=keras.optimizers.SGD(1e-2), loss="mse")
    x = np.random.default_rng(0).normal(0, 1, (4, 8)).astype(np.float32)
    y = np.random.default_rng(1).normal(0, 1, (4, 3)).astype(np.float32)
    tfgptopt.quantize_aware(model, Int8(scale="learned", activations=None))
    before = quantizers_of(layer)[0].kept.numpy()
    weights = layer.kernel.numpy()
    spec = Int8(scale="learned", activations=None)
    model.fit(x, y, verbose=0, callbacks=[QuantizationAwareTraining(spec)])
    ratio = weights / before
    rounded = np.clip(np.round(ratio), -127, 127) * before
    upstream = x.T @ (2 * (x @ rounded - y) / y.size)
    clipped = np.abs(ratio) >= 127
    slope = np.where(clipped, 127 * np.sign(ratio), np.round(ratio) - ratio)
    gradient = (slope * upstream).sum(0, keepdims=True) / np.sqrt(8 * 127)
    expected = before - 1e-2 * gradient
    found = quantizers_of(layer)[0].kept.numpy()
    np.testing.assert_allclose(found - before, expected - before, rtol=2e-2, atol=1e-9)
    assert (found != before).all()


@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"replicas": True}, {"block_size": 32}], ids=str
)
def test_learned_scales_move_and_ship(options, tmp_path):
    options = dict(options)
    spec = Int4(scale="learned", block_size=options.pop("block_size", None))
    if options.pop("replicas", False):
        with two_replicas().scope():
            model = compiled(keras.optimizers.Adam(1e-2))
    else:
        model = compiled(keras.optimizers.Adam(1e-2), **options)
    fit(model, [QuantizationAwareTraining(spec)], steps=1)
    first = scales(model)
    fit(model, [QuantizationAwareTraining(spec)])
    second = scales(model)
    moved = [np.abs(second[path] / first[path] - 1).max() for path in first]
    assert all(0 < share < 0.3 for share in moved)
    stored = {m.name: m for m in read_decoder(model).matrices()}
    for target in select(model):
        rounded = target.to_matrix(target.layer.rounded()).numpy()
        np.testing.assert_array_equal(stored[target.path].floats(), rounded.T)


@pytest.mark.parametrize("spec", [Int4(), LEARNED], ids=str)
def test_frozen_scales_stay_and_weights_move_on(spec):
    model = compiled(keras.optimizers.Adam(1e-2))
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(
            (scales(model), model.get_weights()) if batch >= 3 else None
        )
    )
    fit(model, [QuantizationAwareTraining(spec, freeze_step=2), watch], steps=6)
    (first, weights), (last, later) = seen[3], seen[5]
    for path, scale in first.items():
        np.testing.assert_array_equal(scale, last[path])
    assert any((ours != theirs).any() for ours, theirs in zip(weights, later, strict=True))


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("spec", "restore_first", "killed_at"),
    [(Int8(), True, 9), (Int8(), False, 20), (LEARNED, True, 20), (LEARNED, False, 9)],
    ids=str,
)
def test_a_killed_run_resumes_with_the_same_bits(spec, restore_first, killed_at, tmp_path):
    def kill(batch, logs=None):
        if int(model.optimizer.iterations) == killed_at:
            raise Killed

    def make():
        keras.utils.set_random_seed(1)
        layers = [keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(16)]
        model = keras.Sequential(layers)
        model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
        return model

    def train(model, callbacks):
        x = np.random.default_rng(0).normal(0, 1, (32, 16))
        options = {"epochs": 4, "verbose": 0, "shuffle": False}
        model.fit(x, x, batch_size=4, callbacks=callbacks, **options)

    def callbacks(*more):
        rounding = QuantizationAwareTraining(spec, freeze_step=14)
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        return [*((backup, rounding) if restore_first else (rounding, backup)), *more]

    model = make()
    with pytest.raises(Killed):
        train(model, callbacks(keras.callbacks.LambdaCallback(on_train_batch_begin=kill)))
    resumed, whole = make(), make()
    train(resumed, callbacks())
    train(whole, [QuantizationAwareTraining(spec, freeze_step=14)])
    for ours, theirs in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(scales(resumed).values(), scales(whole).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_adapters_are_merged_before_rounding():
    model = compiled()
    dense = model.backbone.transformer_layers[0]._feedforward_output_dense
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.random.default_rng(0).normal(0, 0.1, (2, 32)))
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=model.loss)
    base = dense._kernel.numpy()
    fit(model, [QuantizationAwareTraining(Int4())])
    np.testing.assert_array_equal(dense._kernel.numpy(), base)
    merged = base + dense.lora_kernel_a.numpy() @ dense.lora_kernel_b.numpy()
    scale = np.abs(merged).max(0) / 7
    expected = np.round(merged / scale) * scale
    np.testing.assert_allclose(dense.rounded().numpy(), expected, rtol=1e-4, atol=1e-6)
    stored = {m.name: m for m in read_decoder(model).matrices()}[dense._kernel.path].floats()
    np.testing.assert_array_equal(stored.T, dense.rounded().numpy())
    inputs = random_batch()[0]
    before = np.asarray(model(inputs))
    shipped = dense.rounded().numpy()
    tfgptopt.finalize(model)
    assert not dense.lora_enabled and len(dense.trainable_variables) == 2
    np.testing.assert_array_equal(dense.kernel.numpy(), shipped)
    tfgptopt.quantize_aware(model, Int4())
    np.testing.assert_allclose(model(inputs), before, atol=1e-4)
    other = make_gpt(layers=1)
    other.backbone.transformer_layers[0]._feedforward_output_dense.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA adapters, and a learned scale"):
        tfgptopt.quantize_aware(other, LEARNED)


def test_groups_have_specs_of_their_own():
    model = compiled()
    body, rest = QuantizationAwareTraining(Int4(), "feedforward"), "attention|embedding"
    fit(model, [body, QuantizationAwareTraining(Int8(activations=None), rest)], steps=1)
    bits = {t.path: t.layer.quantization_spec for t in select(model)}
    assert all((spec == Int4()) == ("feedforward" in path) for path, spec in bits.items())


def test_frozen_layers_and_pruned_ones_are_rounded_too():
    model = compiled()
    model.backbone.token_embedding.trainable = False
    model.compile(optimizer="adam", loss=model.loss)
    fit(model, [Pruning(ConstantSparsity(0.5, 0)), QuantizationAwareTraining(LEARNED)])
    assert {m.bits for m in read_decoder(model).matrices()} == {4, 8}
    for target in select(model):
        zero = ~target.variable.constraint.mask.numpy()
        assert zero.mean() == pytest.approx(0.5, abs=0.01)
        assert (target.layer.rounded().numpy()[zero] == 0).all()


def test_a_layer_wrapped_by_hand_trains_saves_and_comes_back(tmp_path):
    model = keras.Sequential([
        keras.Input((32,)),
        quantize_aware_layer(keras.layers.Dense(16, activation="relu"), Int4(block_size=32)),
        quantize_aware_layer(keras.layers.Dense(4), Int8(scale="learned")),
    ])  # fmt: skip
    assert isinstance(model.layers[0], keras.layers.Dense)
    model.compile(optimizer="adam", loss="mse")
    x = np.random.default_rng(0).normal(0, 1, (8, 32)).astype(np.float32)
    model.fit(x, np.zeros((8, 4)), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(x), again(x))
    assert again.layers[0].quantization_spec == Int4(block_size=32)
    with pytest.raises(ValueError, match="quantize-aware already"):
        quantize_aware_layer(model.layers[0], Int8())
    with pytest.raises(ValueError, match=r"call `tfgptopt\.quantize_aware`"):
        quantize_aware_layer(keras.layers.LayerNormalization(), Int8())


def test_an_untied_head_is_rounded_for_itself():
    layer = keras.layers.ReversibleEmbedding(10, 16, tie_weights=False)
    layer.build()
    hidden = np.random.default_rng(1).normal(0, 1, (3, 16)).astype(np.float32)
    head = layer.reverse_embeddings.numpy()
    tfgptopt.quantize_aware(layer, Int8(activations=None))
    scale = np.abs(head).max(0) / 127
    expected = hidden @ (np.round(head / scale) * scale)
    np.testing.assert_allclose(layer(hidden, reverse=True), expected, atol=1e-4)


def test_bad_settings():
    for settings, message in (
        ({"block_size": 48}, "multiple of 32"),
        ({"scale": "max"}, "one of"),
        ({"activations": "static"}, "dynamic"),
    ):
        with pytest.raises(ValueError, match=message):
            Int4(**settings)
    with pytest.raises(ValueError, match="freeze_step"):
        QuantizationAwareTraining(Int8(), start_step=5, freeze_step=3)
