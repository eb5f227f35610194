"""The layouts of KerasHub's families: the one place that spells their attribute names."""

from __future__ import annotations

from dataclasses import replace

import keras_hub

from tfgptopt.families.layout import Layout, Part


def _norm(path: str) -> Part:
    return Part(path, ("width",), kind="norm")


def _post_norm(path: str) -> Part:
    return Part(path, ("width",), kind="post_norm")


def _query(path: str) -> Part:
    return Part(path, ("width", "heads", "head_dim"), ("heads", "head_dim"), "query")


def _key(path: str) -> Part:
    return Part(path, ("width", "kv_heads", "head_dim"), ("kv_heads", "head_dim"))


def _output(path: str) -> Part:
    return Part(path, ("heads", "head_dim", "width"), ("width",), "writes")


def _up(path: str) -> Part:
    return Part(path, ("width", "feedforward"), ("feedforward",))


def _down(path: str) -> Part:
    return Part(path, ("feedforward", "width"), ("width",), "writes")


GPT2 = Layout(
    attention="_self_attention_layer",
    query=_query("_self_attention_layer._query_dense"),
    key=_key("_self_attention_layer._key_dense"),
    value=_key("_self_attention_layer._value_dense"),
    output=_output("_self_attention_layer._output_dense"),
    up=_up("_feedforward_intermediate_dense"),
    down=_down("_feedforward_output_dense"),
    attention_norm=_norm("_self_attention_layer_norm"),
    feedforward_norm=_norm("_feedforward_layer_norm"),
    activation="_feedforward_intermediate_dense.activation",
    heads="num_heads",
    kv_heads=None,
    positions="position_embedding",
    shrinks=True,
)
LLAMA = replace(
    GPT2,
    gate=_up("_feedforward_gate_dense"),
    attention_norm=_norm("_self_attention_layernorm"),
    feedforward_norm=_norm("_feedforward_layernorm"),
    rotary="_self_attention_layer.rotary_embedding_layer",
    activation="activation",
    heads="num_query_heads",
    kv_heads="num_key_value_heads",
    positions=None,
)
QWEN3 = replace(
    LLAMA,
    head_dim="head_dim",
    query_norm=Part("_self_attention_layer._query_dense_layer_norm", kind="inner"),
    key_norm=Part("_self_attention_layer._key_dense_layer_norm", kind="inner"),
)
# Of mixtures, `tfgptopt.decoder.experts` says where the neurons are.
MIXTRAL = replace(
    LLAMA,
    query=_query("_self_attention_layer.query_dense"),
    key=_key("_self_attention_layer.key_dense"),
    value=_key("_self_attention_layer.value_dense"),
    output=_output("_self_attention_layer.output_dense"),
    activation=None,
    shrinks=False,
)
QWEN_MOE = replace(MIXTRAL, output=LLAMA.output)
QWEN3_MOE = replace(QWEN3, activation=None, shrinks=False)
GPT_OSS = replace(
    MIXTRAL,
    attention="self_attention_layer",
    query=_query("self_attention_layer.query_dense"),
    key=_key("self_attention_layer.key_dense"),
    value=_key("self_attention_layer.value_dense"),
    output=_output("self_attention_layer.output_dense"),
    attention_norm=_norm("input_layernorm"),
    feedforward_norm=_norm("post_attention_layernorm"),
    rotary="self_attention_layer.rotary_embedding_layer",
    head_dim="head_dim",
)
PHI3 = Layout(
    attention="attention",
    query=_query("attention.query_dense"),
    key=_key("attention.key_dense"),
    value=_key("attention.value_dense"),
    output=_output("attention.output_dense"),
    up=_up("feedforward_intermediate_dense"),
    down=_down("feedforward_output_dense"),
    gate=_up("feedforward_gate_dense"),
    attention_norm=_norm("pre_attention_layernorm"),
    feedforward_norm=_norm("post_attention_layernorm"),
    rotary="attention.rotary_embedding_layer",
    activation="activation",
)
SMOLLM3 = Layout(
    attention="self_attn",
    query=Part("self_attn.q_proj", kind="query"),
    key=Part("self_attn.k_proj"),
    value=Part("self_attn.v_proj"),
    output=Part("self_attn.o_proj", kind="writes"),
    up=_up("mlp.up_proj"),
    down=_down("mlp.down_proj"),
    gate=_up("mlp.gate_proj"),
    attention_norm=_norm("input_layernorm"),
    feedforward_norm=_norm("post_attention_layernorm"),
    rotary="self_attn.rotary_embedding",
    heads="num_attention_heads",
    final_norm="norm",
)
GEMMA = Layout(
    attention="attention",
    query=Part("attention.query_dense", ("heads", "width", "head_dim"), kind="query"),
    key=Part("attention.key_dense", ("kv_heads", "width", "head_dim")),
    value=Part("attention.value_dense", ("kv_heads", "width", "head_dim")),
    output=Part("attention.output_dense", ("heads", "head_dim", "width"), kind="writes"),
    gate=Part("gating_ffw", ("width", "feedforward")),
    up=Part("gating_ffw_2", ("width", "feedforward")),
    down=Part("ffw_linear", ("feedforward", "width"), kind="writes"),
    attention_norm=_norm("pre_attention_norm"),
    feedforward_norm=_norm("pre_ffw_norm"),
    post_attention_norm=_post_norm("post_attention_norm"),
    post_feedforward_norm=_post_norm("post_ffw_norm"),
    rotary="attention.rope_layer",
    head_dim="head_dim",
    norm_offset=1.0,
    scales_tokens=True,
    gates_in_intermediate=True,
    shrinks=True,
)
GEMMA3 = replace(
    GEMMA,
    query_norm=Part("attention.query_norm", kind="inner"),
    key_norm=Part("attention.key_norm", kind="inner"),
    gates_in_intermediate=False,
    shrinks=False,
    towers=("vision_encoder",),
)
GEMMA4 = replace(
    GEMMA3,
    value_norm=Part("attention.value_norm", kind="inner"),
    head_dim=None,
    norm_offset=0.0,
    towers=("vision_encoder", "audio_encoder"),
)
GEMMA3N = Layout(
    attention="attention",
    query=Part("attention.q_proj", kind="query"),
    key=Part("attention.k_proj"),
    value=Part("attention.v_proj"),
    output=Part("attention.o_proj", kind="writes"),
    gate=Part("mlp.gate_proj"),
    up=Part("mlp.up_proj"),
    down=Part("mlp.down_proj", kind="writes"),
    attention_norm=_norm("input_layernorm"),
    feedforward_norm=_norm("pre_feedforward_layernorm"),
    post_attention_norm=_post_norm("post_attention_layernorm"),
    post_feedforward_norm=_post_norm("post_feedforward_layernorm"),
    query_norm=Part("attention.q_norm", kind="inner"),
    key_norm=Part("attention.k_norm", kind="inner"),
    value_norm=Part("attention.v_norm", kind="inner"),
    rotary="attention.rotary_embedding",
    activation="mlp.act_fn",
    heads="num_attention_heads",
    blocks="language_model.transformer_layers",
    token_embedding="language_model.embed_tokens.embedding",
    final_norm="language_model.final_normalization",
    shares_norms=True,
    towers=("vision_encoder", "audio_encoder"),
)
BLOOM = replace(
    GPT2,
    up=_up("_mlp_intermediate_dense"),
    down=_down("_mlp_output_dense"),
    attention_norm=_norm("_pre_attention_layernorm"),
    feedforward_norm=_norm("_post_attention_layernorm"),
    activation=None,
    embedding_norm="embeddings_layer_norm",
    positions=None,
    shrinks=False,
)
FALCON = Layout(
    attention="attention_layer",
    query=Part("attention_layer.query_dense", kind="query"),
    key=Part("attention_layer.key_dense"),
    value=Part("attention_layer.value_dense"),
    output=Part("attention_layer.output_dense", kind="writes"),
    up=_up("dense_h_to_4h"),
    down=_down("dense_4h_to_h"),
    attention_norm=_norm("input_layernorm"),
    feedforward_norm=_norm("post_attention_layernorm"),
    activation="dense_h_to_4h.activation",
    heads="num_attention_heads",
    kv_heads=None,
    final_norm="final_layernorm",
)
GPT_NEO_X = replace(
    GPT2,
    query=None,
    key=None,
    value=None,
    query_key_value=Part("_self_attention_layer._qkv_dense"),
    rotary="_self_attention_layer.rotary_embedding_layer",
    parallel=True,
    positions=None,
    shrinks=False,
)

LAYOUTS: dict[type, Layout] = {
    keras_hub.models.BloomBackbone: BLOOM,
    keras_hub.models.FalconBackbone: FALCON,
    keras_hub.models.GPT2Backbone: GPT2,
    keras_hub.models.GPTNeoXBackbone: GPT_NEO_X,
    keras_hub.models.Gemma3Backbone: GEMMA3,
    keras_hub.models.Gemma3nBackbone: GEMMA3N,
    keras_hub.models.Gemma4Backbone: GEMMA4,
    keras_hub.models.GemmaBackbone: GEMMA,
    keras_hub.models.GptOssBackbone: GPT_OSS,
    keras_hub.models.Llama3Backbone: LLAMA,
    keras_hub.models.LlamaBackbone: LLAMA,
    keras_hub.models.MistralBackbone: replace(LLAMA, head_dim="head_dim"),
    keras_hub.models.MixtralBackbone: MIXTRAL,
    keras_hub.models.OPTBackbone: replace(GPT2, positions="embeddings.position_embedding"),
    keras_hub.models.Phi3Backbone: PHI3,
    keras_hub.models.Qwen3Backbone: QWEN3,
    keras_hub.models.Qwen3MoeBackbone: QWEN3_MOE,
    keras_hub.models.QwenBackbone: LLAMA,
    keras_hub.models.QwenMoeBackbone: QWEN_MOE,
    keras_hub.models.SmolLM3Backbone: SMOLLM3,
}
