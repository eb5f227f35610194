"""Makes the files that `decode.py` compares: one model in the formats of every engine."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from decode_engines import PROMPT
from smollm2_files import make_smollm2, smollm2_gguf

import tfgptopt
from tfgptopt.decoder import read_decoder
from tfgptopt.exporting import TFLite
from tfgptopt.quantization import Int4, Int8

SHAPE = {"num_layers": 12, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072}
SMALL = {"num_layers": 2, "num_heads": 4, "hidden_dim": 256, "intermediate_dim": 1024}
VOCABULARY, CONTEXT = 50257, 1024


def make_gpt2(small: bool) -> Any:
    """Returns a GPT-2 with random weights, biases included."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        VOCABULARY, **(SMALL if small else SHAPE), max_sequence_length=CONTEXT, dropout=0.0
    )
    generator = np.random.default_rng(0)
    for weight in backbone.weights:
        if weight.path.endswith(("bias", "beta")):
            weight.assign(generator.normal(0, 0.1, weight.shape))
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def write_gpt2_gguf(model: Any, path: Path) -> None:
    """Writes a GPT-2 as llama.cpp reads it, in float32."""
    import gguf

    spec = read_decoder(model)
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(spec.token_embedding.values.shape[1])
    writer.add_feed_forward_length(len(spec.blocks[0].feedforward.up.values))
    writer.add_block_count(len(spec.blocks))
    writer.add_head_count(spec.blocks[0].attention.num_heads)
    writer.add_layer_norm_eps(spec.final_norm.epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCABULARY)

    def add(name: str, weight: Any, bias: Any = None) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight, np.float32))
        if bias is not None:
            writer.add_tensor(f"{name}.bias", np.ascontiguousarray(bias, np.float32))

    add("token_embd", spec.token_embedding.values)
    add("position_embd", spec.position_embedding)
    add("output_norm", spec.final_norm.gamma, spec.final_norm.beta)
    for i, block in enumerate(spec.blocks):
        attention, feedforward = block.attention, block.feedforward
        parts = (attention.query, attention.key, attention.value)
        add(f"blk.{i}.attn_norm", block.attention_norm.gamma, block.attention_norm.beta)
        add(
            f"blk.{i}.attn_qkv",
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.bias for part in parts]),
        )
        add(f"blk.{i}.attn_output", attention.output.values, attention.output.bias)
        add(f"blk.{i}.ffn_norm", block.feedforward_norm.gamma, block.feedforward_norm.beta)
        add(f"blk.{i}.ffn_up", feedforward.up.values, feedforward.up.bias)
        add(f"blk.{i}.ffn_down", feedforward.down.values, feedforward.down.bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantize_gguf(source: Path, target: Path, kind: str) -> None:
    """Converts a GGUF by llama.cpp's own tool."""
    import llama_cpp as c

    settings = c.llama_model_quantize_default_params()
    settings.ftype = getattr(c, f"LLAMA_FTYPE_{kind}")
    settings.allow_requantize = True
    assert c.llama_model_quantize(str(source).encode(), str(target).encode(), settings) == 0


def write_all(name: str, folder: Path) -> None:
    """Writes a model in all formats.

    Args:
        name: `"gpt2"`, `"gpt2_small"` (a few layers) or `"smollm2"`.
        folder: Where to write.
    """
    for kind, spec in (("f32", None), ("int8", Int8()), ("int4", Int4())):
        model = make_smollm2() if name == "smollm2" else make_gpt2(name == "gpt2_small")
        if spec is None and name != "smollm2":
            write_gpt2_gguf(model, folder / "F32.gguf")
            from decode_onnx import write_onnx

            write_onnx(read_decoder(model), folder / "int8.onnx", PROMPT)
        if spec is not None:
            tfgptopt.quantize_aware(model, spec)
        tfgptopt.export(model, folder / f"{kind}.tflite", TFLite(CONTEXT))
        if spec is not None and name != "smollm2":  # SmolLM2 has grouped queries.
            path = folder / f"{kind}-kv8.tflite"
            tfgptopt.export(model, path, TFLite(CONTEXT, cache_dtype="int8"))
    source = smollm2_gguf() if name == "smollm2" else folder / "F32.gguf"
    if name == "smollm2":
        requantize_gguf(source, folder / "F32.gguf", "ALL_F32")
    requantize_gguf(source, folder / "Q8_0.gguf", "MOSTLY_Q8_0")
    requantize_gguf(source, folder / "Q4_0.gguf", "MOSTLY_Q4_0")
