"""Copies models: KerasHub's own configurations leave some settings out."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub

from tfgptopt.model.current import merged_weights
from tfgptopt.model.turning import copy_turns
from tfgptopt.model.types import Config


def backbone_config(backbone: keras.Model) -> Config:
    """Returns the configuration of a KerasHub backbone, what its `get_config` forgets included."""
    config: Config = backbone.get_config()
    if hasattr(backbone, "tie_word_embeddings"):
        config["tie_word_embeddings"] = backbone.tie_word_embeddings
    return config


def with_backbone(
    model: keras.Model,
    backbone: keras.Model,
    preprocessor: keras_hub.models.CausalLMPreprocessor | None,
) -> Any:
    """Returns a task of the same class around another backbone."""
    if model is getattr(model, "backbone", model):
        return backbone
    return type(model)(backbone=backbone, preprocessor=preprocessor)


def clone(model: keras.Model) -> keras.Model:
    """Returns a plain copy of a built Keras 3 model, with the same weights, adapters merged.

    Layers that turn features do so in the copy too.

    Args:
        model: A causal LM of KerasHub, a backbone, or a model that `keras.models.clone_model`
            can copy.
    """
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, keras_hub.models.Backbone):
        inner = type(backbone).from_config(backbone_config(backbone))
        copy = with_backbone(model, inner, getattr(model, "preprocessor", None))
    else:
        copy = keras.models.clone_model(model)
    copy.set_weights(merged_weights(model))
    copy_turns(model, copy)
    return copy
