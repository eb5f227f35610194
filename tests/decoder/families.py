"""A tiny model of each family with its peculiarities switched on, and random weights."""

import keras
import keras_hub
import numpy as np

CONTEXT = 96
VOCABULARY = 211
_SHAPE = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 48}
_GROUPED = {**_SHAPE, "num_query_heads": 4, "num_key_value_heads": 2}
_LLAMA31 = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 32,
}
_GEMMA2 = {
    "query_head_dim_normalize": False,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 3.0,
    "final_logit_soft_cap": 5.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 10,
}
_SU = {
    "max_sequence_length": 128,
    "rope_scaling_type": "su",
    "rope_scaling_short_factor": [1.0, 1.1, 1.2, 1.3],
    "rope_scaling_long_factor": [1.0, 2.0, 3.0, 4.0],
}
# Name: (family, settings). Names that differ from the family show another configuration of it.
FAMILIES = {
    "GPT2": ("GPT2", {**_SHAPE, "num_heads": 4, "max_sequence_length": CONTEXT}),
    "OPT": ("OPT", {**_SHAPE, "num_heads": 4, "max_sequence_length": CONTEXT}),
    "GPTNeoX": ("GPTNeoX", {**_SHAPE, "num_heads": 2, "rotary_percentage": 0.5}),
    "Bloom": ("Bloom", {**_SHAPE, "num_heads": 4}),
    "Bloom of 6 heads": ("Bloom", {**_SHAPE, "hidden_dim": 48, "num_heads": 6}),
    "Falcon": ("Falcon", {**_SHAPE, "num_attention_heads": 4, "layer_norm_epsilon": 1e-3}),
    "Llama": ("Llama", {**_GROUPED, "rope_position_scaling_factor": 2.0}),
    "Llama3": ("Llama3", {**_GROUPED, **_LLAMA31, "tie_word_embeddings": True}),
    "SmolLM3": (
        "SmolLM3",
        {
            **_SHAPE,
            "num_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "rope_layer_enabled_list": [True, False, True],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_bias": True,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 64,
            "rope_theta": 5000.0,
            "partial_rotary_factor": 1.0,
        },
    ),
    "Mistral": (
        "Mistral",
        {**_GROUPED, "sliding_window": 12, "head_dim": 16, "rope_scaling_factor": 2.0},
    ),
    "Qwen2": (
        "Qwen",
        {**_GROUPED, "use_sliding_window_attention": True, "sliding_window_size": 9},
    ),
    "Qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16, "sliding_window_size": 11}),
    "Phi3": ("Phi3", {**_GROUPED, "pretraining_sequence_length": CONTEXT, **_SU}),
    "Gemma": ("Gemma", {**_GROUPED, "head_dim": 16, "num_key_value_heads": 1}),
    "Gemma 2": ("Gemma", {**_GROUPED, "head_dim": 16, **_GEMMA2}),
    "Gemma 3": (
        "Gemma3",
        {
            **_GROUPED,
            "num_layers": 7,
            "image_size": 16,
            "head_dim": 16,
            **_GEMMA2,
            "global_rope_scaling_factor": 8.0,
        },
    ),
    "Gemma 4": (
        "Gemma4",
        {
            **_GROUPED,
            "num_layers": 4,
            "image_size": 16,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "sliding_window_size": 10,
            "sliding_window_pattern": 2,
            "global_rope_partial_rotary_factor": 0.5,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "use_double_wide_mlp": True,
            "final_logit_soft_cap": 5.0,
        },
    ),
    "Gemma 3n": (
        "Gemma3n",
        {
            "text_vocab_size": VOCABULARY,
            "text_hidden_size": 32,
            "num_hidden_layers": 4,
            "pad_token_id": 0,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": [48] * 4,
            "hidden_activation": "gelu_approximate",
            "layer_types": [
                "full_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "sliding_window": 10,
            "rope_theta": 1e6,
            "max_position_embeddings": CONTEXT,
            "vocab_size_per_layer_input": 200,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.9, 0.0, 0.9, 0.0],
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "laurel_rank": 4,
            "num_kv_shared_layers": 1,
            "final_logit_soft_cap": 5.0,
        },
    ),
}


def randomize(model, seed=0):
    """Gives every weight, norms and biases too, values that matter and keep an argmax stable."""
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        if "inv_freq" in weight.path:
            continue
        name = weight.path.rsplit("/", 1)[-1]
        values = generator.normal(0, 1, weight.shape)
        if name in ("gamma", "scale", "layer_scalar", "correct_output_scale"):
            values = weight.numpy() + 0.3 * values
        elif name in ("bias", "beta"):
            values = 0.3 * values
        elif name == "embeddings":
            values = 0.6 * values
        else:
            values *= 1.2 / np.sqrt(32)
        weight.assign(values)


def make(name, **changes):
    """Returns a causal LM of a family."""
    family, settings = FAMILIES[name]
    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, f"{family}Backbone")(**{**settings, **changes})
    model = getattr(keras_hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    randomize(model)
    return model


def logits(model, tokens):
    """Returns what the model's own call gives for a text, `(tokens, vocabulary)`."""
    mask = np.ones((1, len(tokens)), np.int32)
    return np.asarray(model({"token_ids": np.asarray([tokens]), "padding_mask": mask}))[0]


def prompt(length, seed=1):
    """Returns random tokens."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def of_own_class(model):
    """Makes a model one of a class from outside KerasHub, which may compute anything."""
    model.__class__ = type("OwnCausalLM", (type(model),), {})
    return model
