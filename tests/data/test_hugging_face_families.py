"""Folders by Hugging Face's own names and layouts, written from a Keras model: the one that is
loaded from them computes the same."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from data.chatty import gemma_proto
from decoder.families import logits, make
from safetensors.numpy import save_file

import tfgptopt
from tfgptopt.data import load_preset

ATTENTION = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
FEEDFORWARD = {
    "ffw_gating": "gate", "ffw_gating_2": "up", "ffw_linear": "down",
    "feedforward_gate_dense": "gate", "feedforward_intermediate_dense": "up",
    "feedforward_output_dense": "down",
}  # fmt: skip
NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "self_attention_layernorm": "input_layernorm",
    "feedforward_layernorm": "post_attention_layernorm",
}
OUTSIDE = {
    "token_embedding/embeddings": "model.embed_tokens.weight",
    "token_embedding/reverse_embeddings": "lm_head.weight",
    "final_normalization/scale": "model.norm.weight",
    "sequence_output_layernorm/scale": "model.norm.weight",
}


def torch_linear(values: np.ndarray, name: str, heads_first: bool) -> np.ndarray:
    """A kernel as `torch.nn.Linear` holds it, `(outputs, inputs)`."""
    if name == "attention_output":
        return values.reshape(-1, values.shape[-1]).T
    if values.ndim == 3 and heads_first:  # Gemma: (heads, inputs, size).
        values = values.transpose(1, 0, 2)
    return values.reshape(values.shape[0], -1).T


def like_llama(backbone, heads_first: bool) -> dict[str, np.ndarray]:
    """The names that Llama began and Qwen and Gemma use."""
    weights = {}
    for variable in backbone.weights:
        values = variable.numpy()
        if variable.path in OUTSIDE:
            values = values.T if "reverse" in variable.path else values
            weights[OUTSIDE[variable.path]] = np.ascontiguousarray(values)
            continue
        block, *_, layer, kind = variable.path.split("/")
        prefix = f"model.layers.{re.search(r'[0-9]+$', block)[0]}."
        if layer in NORMS:
            weights[f"{prefix}{NORMS[layer]}.weight"] = values
        elif layer in ("query_norm", "key_norm"):
            weights[f"{prefix}self_attn.{layer[0]}_norm.weight"] = values
        elif kind == "bias":
            weights[f"{prefix}self_attn.{ATTENTION[layer]}_proj.bias"] = values.reshape(-1)
        else:
            place = f"self_attn.{ATTENTION[layer]}" if layer in ATTENTION else ""
            name = f"{prefix}{place or 'mlp.' + FEEDFORWARD[layer]}_proj.weight"
            weights[name] = np.ascontiguousarray(torch_linear(values, layer, heads_first))
    return weights


def like_gpt2(backbone) -> dict[str, np.ndarray]:
    """The names of GPT-2, whose kernels are `(inputs, outputs)`."""
    w = {variable.path: variable.numpy() for variable in backbone.weights}
    found = {
        "wte.weight": w["token_embedding/embeddings"],
        "wpe.weight": w["position_embedding/embeddings"],
        "ln_f.weight": w["layer_norm/gamma"],
        "ln_f.bias": w["layer_norm/beta"],
    }
    width = found["wte.weight"].shape[1]
    for i in range(backbone.num_layers):
        old, new = f"transformer_layer_{i}/", f"h.{i}."
        attention = f"{old}self_attention/"
        for kind, rows in (("kernel", (width, -1)), ("bias", (-1,))):
            parts = [w[f"{attention}{x}/{kind}"].reshape(rows) for x in ("query", "key", "value")]
            suffix = "weight" if kind == "kernel" else "bias"
            found[f"{new}attn.c_attn.{suffix}"] = np.concatenate(parts, -1)
            found[f"{new}attn.c_proj.{suffix}"] = w[f"{attention}attention_output/{kind}"].reshape(
                (-1, width) if kind == "kernel" else (-1,)
            )
            for x, y in (("intermediate", "c_fc"), ("output", "c_proj")):
                found[f"{new}mlp.{y}.{suffix}"] = w[f"{old}feedforward_{x}_dense/{kind}"]
        for x, y in (("self_attention_layer_norm", "ln_1"), ("feedforward_layer_norm", "ln_2")):
            found[f"{new}{y}.weight"] = w[f"{old}{x}/gamma"]
            found[f"{new}{y}.bias"] = w[f"{old}{x}/beta"]
    return found


def write_gpt2(folder, corpus):
    vocabulary = {**corpus.tokenizer.vocabulary, "<|endoftext|>": 300}
    model = make("GPT2", vocabulary_size=len(vocabulary), intermediate_dim=128)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *corpus.tokenizer.merges]))
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
              "vocab_size": len(vocabulary), "n_layer": 2, "n_head": 4,
              "n_embd": 32, "n_positions": 96, "resid_pdrop": 0.0}  # fmt: skip
    return model, config, like_gpt2(model.backbone)


def write_qwen(folder, corpus):
    vocabulary = dict(corpus.tokenizer.vocabulary)
    model = make("Qwen2", vocabulary_size=len(vocabulary) + 3, use_sliding_window_attention=False)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added = [{"id": len(vocabulary) + i, "content": name} for i, name in enumerate(names)]
    tokens = {"vocab": vocabulary, "merges": list(corpus.tokenizer.merges)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": tokens, "added_tokens": added}))
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
              "vocab_size": len(vocabulary) + 3, "hidden_size": 32,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 10000,
              "use_sliding_window": False, "sliding_window": 9,
              "tie_word_embeddings": model.backbone.tie_word_embeddings}  # fmt: skip
    return model, config, like_llama(model.backbone, heads_first=False)


def write_gemma3(folder, corpus):
    proto = gemma_proto()
    (folder / "tokenizer.model").write_bytes(proto)
    settings = {"attention_logit_soft_cap": None, "final_logit_soft_cap": None}
    model = make("Gemma 3", vocabulary_size=400, image_size=None, **settings)
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
              "vocab_size": 400, "hidden_size": 32, "head_dim": 16,
              "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "sliding_window": 10, "query_pre_attn_scalar": 8,
              "rope_parameters": {"full_attention": {"factor": 8.0}}}  # fmt: skip
    return model, config, like_llama(model.backbone, heads_first=True)


@pytest.mark.parametrize("write", [write_gpt2, write_qwen, write_gemma3], ids=lambda f: f.__name__)
def test_a_folder_computes_what_its_model_did(write, corpus, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    model, config, weights = write(folder, corpus)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_preset(folder)
    preprocessor, loaded.preprocessor = loaded.preprocessor, None
    tokens = [5, 17, 200, 31, 8, 12, 99, 64, 5, 5, 71, 20, 33]
    expected = logits(model, tokens)
    np.testing.assert_allclose(logits(loaded, tokens), expected, atol=2e-4 * np.ptp(expected))
    loaded.preprocessor = preprocessor
    lm = tfgptopt.TFLiteCausalLM(tfgptopt.export(loaded, tmp_path / "gpt.tflite"))
    assert lm.generate(tokens, max_length=14, stop=None)[13] == expected[-1].argmax()
    assert lm.tokenize("def x") == np.asarray(preprocessor.tokenizer("def x")).tolist()
