"""Makes a smaller model out of the most important parts of a larger one."""

from __future__ import annotations

from typing import Any

import keras

from tfgptopt.model import masks
from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.cloning import with_backbone
from tfgptopt.quantization.layers import is_dressed
from tfgptopt.shrinking.families import family_of
from tfgptopt.shrinking.importance import Importance, importance
from tfgptopt.shrinking.search import search
from tfgptopt.shrinking.shapes import Shape, resolve, shape_of
from tfgptopt.shrinking.surgery import build, choose, operate
from tfgptopt.shrinking.vocabularies import choose_tokens, shrink_preprocessor, tokenizer_of

# Cuts that depend on what the data shows.
_MEASURED = ("depth", "heads", "kv_heads", "feedforward", "width", "vocabulary")


def _check_model(model: Any) -> None:
    family_of(model)
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: {model!r}")
    dressed = any(is_dressed(layer) for layer in model._flatten_layers())
    if dressed or any(masks.masked(variable) for variable in model.variables):
        raise ValueError(
            f"'{model.name}' is pruned or quantize-aware. Shrink first, then prune and quantize; "
            "or call `tfgptopt.finalize(model)` before."
        )
    adapted = [x.path for x in model._flatten_layers() if getattr(x, "lora_enabled", False)]
    if adapted:
        raise ValueError(
            f"'{model.name}' has LoRA adapters, such as those of {adapted[0]}. Merge them first: "
            "save the model's weights and load them into one without adapters."
        )


def check_request(**settings: Any) -> tuple[str, float] | None:
    """Returns the name and value of the budget, or `None` if numbers are given.

    Raises:
        ValueError: If both are given, or nothing, or a budget is out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    budgets = [name for name in ("parameters", "latency") if name in given]
    if len(given) != 1 if budgets else not given:
        raise ValueError(
            "Give what to shrink (such as `depth=0.5`), or one budget (`parameters=0.7` or "
            f"`latency=0.6`). Received: {', '.join(given) or 'nothing'}"
        )
    if not budgets:
        return None
    name = budgets[0]
    if not isinstance(given[name], float) or not 0.0 < given[name] < 1.0:
        raise ValueError(f"`{name}` must be a float in (0, 1). Received: {given[name]!r}")
    return name, given[name]


def shrink(
    model: Any,
    depth: int | float | None = None,
    heads: int | float | None = None,
    kv_heads: int | float | None = None,
    feedforward: int | float | None = None,
    width: int | float | None = None,
    vocabulary: int | float | None = None,
    context: int | float | None = None,
    calibration: Any = None,
    parameters: float | None = None,
    latency: float | None = None,
    depth_score: str = "influence",
) -> Any:
    """Returns a new, smaller model of the same class, made of the most important parts.

    Numbers are ints, or floats as shares of what there is. Or give one budget, `parameters` or
    `latency`, and the shape is searched: of the shapes that fit, the one with the lowest loss on
    the calibration data. The model that is given stays as it is. Train the new one afterwards,
    best with the old one as its teacher: see `tfgptopt.Distiller`.

    In GPT-2, OPT, Llama and Qwen2 the size of a head is `hidden_dim // heads`, and has to stay:
    heads follow `width` there. Where heads share keys and values, `kv_heads` takes whole groups,
    and `heads` equally many of each group.

    Args:
        model: A causal LM of KerasHub, or a backbone: GPT-2, OPT, Llama, Mistral, Qwen 2 and 3,
            Gemma 1 and 2.
        depth: Decoder layers to keep, by `depth_score`.
        heads: Query heads of each layer to keep, by what they add to the stream.
        kv_heads: Heads of keys and values to keep, with the query heads that share them.
        feedforward: Neurons of each layer's feed-forward network to keep, likewise.
        width: Features of the residual stream to keep.
        vocabulary: Tokens to keep, by how often they occur in `calibration`. Single bytes and
            special tokens stay, so that any text can be encoded; the tokenizer is rewritten.
        context: Positions to keep, for models with a table of them: the first ones.
        calibration: Text, or batches as `fit` reads them. Needed for all but `context`.
        parameters: float in (0, 1). Share of the weights to keep.
        latency: float in (0, 1). Share of the time per generated token of the exported `.tflite`
            file, measured.
        depth_score: `"influence"` or `"loss"`; see `tfgptopt.shrinking.importance`. Defaults to
            `"influence"`.

    Returns:
        A model of the same class, uncompiled.

    Raises:
        ValueError: If the family cannot be shrunk or cannot have the shape, a number is out of
            range, or calibration data is missing or empty.

    Example:

    ```python
    student = tfgptopt.shrink(gpt, depth=6, feedforward=0.5, calibration=corpus.train.take(16))
    half = tfgptopt.shrink(gpt, parameters=0.5, calibration=corpus.train.take(16))
    ```

    Reference: Muralidharan et al., 2024, "Compact Language Models via Pruning and Knowledge
    Distillation" (https://arxiv.org/abs/2407.14679).
    """
    _check_model(model)
    wanted = {
        "depth": depth,
        "heads": heads,
        "kv_heads": kv_heads,
        "feedforward": feedforward,
        "width": width,
        "vocabulary": vocabulary,
        "context": context,
    }
    budget = check_request(**wanted, parameters=parameters, latency=latency)
    given = [name for name, value in wanted.items() if value is not None]
    shape = shape_of(model) if budget else resolve(model, **wanted)
    if vocabulary is not None:
        tokenizer_of(model)  # Raises if there is none to rewrite.
    needed = budget or any(name in _MEASURED for name in given)
    found = importance(model, calibration, depth_score) if needed else None
    if budget:
        assert found is not None
        return search(model, found, calibration, *budget, shrink_to)
    return shrink_to(model, shape, found)


def shrink_to(model: Any, shape: Shape, found: Importance | None) -> Any:
    """Returns a new model of a given shape, made of the most important parts.

    Args:
        model: The model to cut.
        shape: A shape that its family can have.
        found: The importance of its parts; may be `None` if only positions go.
    """
    tokens, preprocessor = None, getattr(model, "preprocessor", None)
    if shape.vocabulary != shape_of(model).vocabulary:
        assert found is not None
        tokens = choose_tokens(tokenizer_of(model), found.vocabulary, shape.vocabulary)
    preprocessor = shrink_preprocessor(preprocessor, tokens, shape.context)
    cut = choose(model, shape, found, tokens)
    with strategy_scope(model):
        small = with_backbone(model, build(model, shape), preprocessor)
        operate(model, small, cut, found)
    return small
