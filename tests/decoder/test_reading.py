import keras
import keras_hub
import numpy as np
import pytest
from decoder.families import FAMILIES, make

from tfgptopt.decoder import check_readable, read_decoder, why_unreadable
from tfgptopt.decoder.reading import alibi_slopes, read_activation

EXPECTED = {
    "GPT2": ["learned positions", "tied head", "layer norms", "4 heads of 8, ", "gelu_tanh of 48"],
    "OPT": ["learned positions", "relu of 48"],
    "GPTNeoX": ["parallel, ", "rotary over 8 features", "gelu_tanh"],
    "Bloom": ["norm of the embeddings", "ALiBi", "gelu_tanh"],
    "Falcon": ["ALiBi", "; feed-forward: gelu of 48"],
    "Llama": ["own head", "rms norms", "4 heads of 8 over 2", "gated silu of 48"],
    "Llama3": ["tied head", "wavelengths up to 50265"],
    "SmolLM3": ["layers 0, 2: rms", "layers 1: rms", "biases", "rotary over 8 features"],
    "Mistral": ["window 12", "own head", "4 heads of 16 over 2"],
    "Qwen2": ["window 9", "biases", "tied head"],
    "Qwen3": ["window 11", "norm of queries and keys"],
    "Phi3": ["others above 96 positions", "own head", "times 1.03"],
    "Gemma": ["embeddings times 5.657", "4 heads of 16 over 1", "gated gelu_tanh of 24"],
    "Gemma 2": ["soft cap 3", "logit soft cap 5", "and after the branches", "layers 0: "],
    "Gemma 3": ["norm of queries and keys", "layers 0-4, 6: ", "gated gelu_tanh of 48"],
    "Gemma 4": [
        "inputs of each layer",
        "4 heads of 16 over 1 of keys and values, scale 1, rotary over 8 features",
        "keys are values too, norm of queries and keys and values",
        "keys and values of layer 0, norm of queries",
        "gated gelu_tanh of 96; own input of 8; times",
    ],
    "Gemma 3n": [
        "inputs of each layer, 3 streams",
        "keys and values of layer 1",
        "gated gelu_tanh above 1.28 deviations of 48; stream 1 of 3; LAuReL of rank 4; own input",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_spec_prints_what_a_family_computes(name):
    text = str(read_decoder(make(name)))
    print(text)
    for part in EXPECTED[name]:
        assert part in text, text


def test_every_family_is_read_from_model_or_backbone():
    assert {name for name in FAMILIES if " of " not in name} == set(EXPECTED)
    model = make("Llama")
    one, other = read_decoder(model), read_decoder(model.backbone)
    assert str(one) == str(other)
    assert (
        sum(m.values.size for m in one.matrices()) + sum(n.gamma.size for n in one.norms())
        == model.count_params()
    )


def test_configurations_that_the_graph_does_not_compute_are_refused():
    with pytest.raises(ValueError, match="use_bidirectional_attention=True"):
        read_decoder(make("Gemma 3", use_bidirectional_attention=True))
    for settings in (
        {"use_bidirectional_attention": True},
        {"vocab_size_per_layer_input": 100},
        {"num_kv_shared_layers": 4},
    ):
        with pytest.raises(ValueError, match=f"A Gemma 4 with `{next(iter(settings))}"):
            read_decoder(make("Gemma 4", **settings))
    model = make("Qwen2")
    model.backbone.transformer_layers[0].activation = keras.activations.tanh
    with pytest.raises(ValueError, match="is none of gelu, gelu_tanh, relu, silu"):
        read_decoder(model)
    model = make("Llama")
    model.backbone.transformer_layers[0]._feedforward_gate_dense.activation = keras.ops.tanh
    with pytest.raises(ValueError, match="a layer without activation"):
        read_decoder(model)
    model = make("GPT2")
    model.backbone.transformer_layers[1].normalize_first = False
    with pytest.raises(ValueError, match="norms before the branches"):
        read_decoder(model)


def test_a_cap_of_logits_behind_the_backbone_is_read():
    capped = make("Gemma 4").backbone
    plain = make("Gemma 4", final_logit_soft_cap=None).backbone
    task = keras_hub.models.Gemma4CausalLM
    found = read_decoder(task(preprocessor=None, backbone=plain, final_logit_cap=3))
    assert found.logit_soft_cap == 3.0
    with pytest.raises(ValueError, match="caps its logits twice, `final_logit_cap=3` behind"):
        read_decoder(task(preprocessor=None, backbone=capped, final_logit_cap=3))


def test_adapters_are_merged():
    model = make("Mistral")
    dense = model.backbone.transformer_layers[0]._feedforward_gate_dense
    plain = dense.kernel.numpy()
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(dense.lora_kernel_b + 0.5)
    found = read_decoder(model).blocks[0].feedforward.gate.values.T
    expected = plain + dense.lora_kernel_a.numpy() @ dense.lora_kernel_b.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


class OwnBackbone(keras_hub.models.GPT2Backbone):
    pass


class OwnDecoder(keras_hub.layers.TransformerDecoder):
    pass


def test_models_without_a_reader_are_told_why():
    settings = FAMILIES["GPT2"][1]
    for model, why in (
        (keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), "no reader for Sequential"),
        (OwnBackbone(**settings), "no reader for OwnBackbone"),
    ):
        assert why in why_unreadable(model)
        with pytest.raises(ValueError, match=f"{why}. Known families of KerasHub: Bloom"):
            check_readable(model)
    model = make("GPT2")
    model.backbone.transformer_layers[0].__class__ = OwnDecoder
    with pytest.raises(ValueError, match="a layer of its own, OwnDecoder"):
        read_decoder(model)


def test_slopes_of_alibi_are_those_of_kerashub():
    layer = keras_hub.layers.AlibiBias()
    for heads in (1, 2, 4, 6, 8, 12, 20):
        np.testing.assert_allclose(alibi_slopes(heads), layer._get_slopes(heads), rtol=1e-6)


def test_activations_are_told_by_what_they_compute():
    assert read_activation(keras.activations.gelu) == "gelu"
    assert read_activation(lambda x: keras.ops.gelu(x, approximate=True)) == "gelu_tanh"
    assert read_activation(keras.ops.silu) == "silu"
    assert read_activation(keras.layers.ReLU()) == "relu"
