"""Local Hugging Face folders of safetensors, written here by their own names."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import tfgptopt
from tfgptopt.data import load_preset, template_of

WIDTH, LAYERS, HEADS, FEEDFORWARD = 32, 2, 4, 64


def normal(generator, *shape):
    return generator.normal(0, 0.2, shape).astype(np.float32)


def llama_weights(vocabulary: int) -> dict[str, np.ndarray]:
    """Weights of a Llama by Hugging Face's names, `(outputs, inputs)`."""
    g, key_values = np.random.default_rng(0), WIDTH // 2
    weights = {
        "model.embed_tokens.weight": normal(g, vocabulary, WIDTH),
        "model.norm.weight": 1 + normal(g, WIDTH),
        "lm_head.weight": normal(g, vocabulary, WIDTH),
    }
    for i in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (key_values, WIDTH),
            "self_attn.v_proj": (key_values, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (FEEDFORWARD, WIDTH),
            "mlp.up_proj": (FEEDFORWARD, WIDTH),
            "mlp.down_proj": (WIDTH, FEEDFORWARD),
        }.items():
            weights[f"model.layers.{i}.{name}.weight"] = normal(g, *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = 1 + normal(g, WIDTH)
    return weights


def llama_logits(w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """The definition, in numpy: float64."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    size = WIDTH // HEADS

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain

    def turned(x):
        frequencies = 10000.0 ** (-np.arange(0, size, 2) / size)
        angles = np.outer(np.arange(len(x)), frequencies)[:, None]
        a, b = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][tokens]
    mask = np.tril(np.ones((len(tokens), len(tokens))))
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).reshape(len(tokens), -1, size)
                   for n in "qkv")  # fmt: skip
        q, k = turned(q), turned(k)
        k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
        scores = np.einsum("thd,shd->hts", q, k) / size**0.5
        scores = np.exp(np.where(mask, scores, -1e9))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", scores, v).reshape(len(tokens), WIDTH)
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * (h @ w[p + "mlp.up_proj.weight"].T)
        x = x + hidden @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def llama(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    folder.mkdir()
    vocabulary = dict(corpus.tokenizer.vocabulary)
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    added = [{"id": len(vocabulary) + i, "content": text} for i, text in enumerate(specials)]
    weights = llama_weights(len(vocabulary) + len(specials))
    save_file(weights, folder / "model.safetensors")
    about = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(vocabulary) + len(specials),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "intermediate_size": FEEDFORWARD,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(about))
    model = {"vocab": vocabulary, "merges": list(corpus.tokenizer.merges)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    config = {"bos_token": specials[0], "eos_token": specials[1]}
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, weights


def test_a_llama_folder_computes_what_its_weights_say(llama, tmp_path):
    folder, weights = llama
    model = load_preset(str(folder))
    tokens = [5, 17, 200, 31, 8]
    inputs = {"token_ids": np.array([tokens]), "padding_mask": np.ones((1, 5), np.int32)}
    expected = llama_logits(weights, tokens)
    preprocessor, model.preprocessor = model.preprocessor, None
    np.testing.assert_allclose(np.asarray(model(inputs))[0], expected, atol=2e-4)
    model.preprocessor = preprocessor
    assert "content" in template_of(model).source
    path = tfgptopt.export(model, tmp_path / "llama.tflite")
    lm = tfgptopt.TFLiteCausalLM(path)
    ids = lm.generate(tokens, max_length=6, stop=None)
    assert ids[5] == expected[-1].argmax()


def test_another_architecture_is_named(llama, tmp_path):
    folder, _ = llama
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="KerasHub cannot load the preset"):
        load_preset(str(tmp_path))
