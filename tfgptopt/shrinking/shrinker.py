"""Makes a smaller model out of the most important parts of a larger one."""

from __future__ import annotations

from typing import Any

import keras

from tfgptopt.model import masks
from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.cloning import with_backbone
from tfgptopt.model.current import has_adapters
from tfgptopt.model.history import history_of, record
from tfgptopt.model.turning import is_turned
from tfgptopt.model.types import Data
from tfgptopt.quantization.layers import is_dressed
from tfgptopt.shrinking.experts import experts_to_keep, fill_experts, make_with_experts
from tfgptopt.shrinking.families import family_of
from tfgptopt.shrinking.importance import Importance, importance
from tfgptopt.shrinking.search import search
from tfgptopt.shrinking.shapes import Shape, resolve, shape_of
from tfgptopt.shrinking.surgery import build, choose, operate
from tfgptopt.shrinking.technique import Shrink
from tfgptopt.shrinking.vocabularies import choose_tokens, rewritable_tokenizer, shrink_preprocessor
from tfgptopt.terminal.progress import Verbose, showing

# Cuts that depend on what the data shows.
_MEASURED = ("depth", "heads", "kv_heads", "feedforward", "width", "vocabulary")


def _check_model(model: keras.Model, request: Shrink) -> None:
    if request.experts is None:
        family_of(model)
    elif others := sorted(set(request.cuts()) - {"experts"}):
        raise ValueError(
            f"Of a mixture experts alone can be left out. Received: experts and {', '.join(others)}"
        )
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: {model!r}")
    dressed = any(is_dressed(layer) for layer in model._flatten_layers())
    if dressed or any(masks.masked(variable) for variable in model.variables):
        raise ValueError(
            f"'{model.name}' is pruned or quantize-aware. Shrink first, then prune and quantize; "
            "or call `tfgptopt.finalize(model)` before."
        )
    turned = next((x.path for x in model._flatten_layers() if is_turned(x)), None)
    if turned is not None:
        raise ValueError(
            f"'{model.name}' is rotated, so none of its features can go alone: {turned} goes on "
            "turning them. Shrink first, then rotate."
        )
    adapted = [x.path for x in model._flatten_layers() if has_adapters(x)]
    if adapted:
        raise ValueError(
            f"'{model.name}' has LoRA adapters, such as those of {adapted[0]}. Merge them first: "
            "`tfgptopt.finalize(model)`."
        )


def shrink(
    model: keras.Model,
    depth: int | float | None = None,
    heads: int | float | None = None,
    kv_heads: int | float | None = None,
    feedforward: int | float | None = None,
    width: int | float | None = None,
    vocabulary: int | float | None = None,
    context: int | float | None = None,
    calibration: Data = None,
    parameters: float | None = None,
    latency: float | None = None,
    depth_score: str = "influence",
    verbose: Verbose = "auto",
    experts: int | float | None = None,
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
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.
        experts: Experts of each layer of a mixture to keep, by how much of the tokens is routed to
            them. Of mixtures nothing else can be cut.

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
    request = Shrink(
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        feedforward=feedforward,
        width=width,
        vocabulary=vocabulary,
        context=context,
        parameters=parameters,
        latency=latency,
        depth_score=depth_score,
        experts=experts,
    )
    _check_model(model, request)
    with showing(verbose):
        small = _shrunk(model, request, calibration)
    record(small, *history_of(model), request)
    return small


def _shrunk(model: keras.Model, request: Shrink, calibration: Data) -> Any:
    """Returns the smaller model that is asked for."""
    if request.experts is not None:
        small = make_with_experts(model, experts_to_keep(model, request.experts))
        fill_experts(model, small, calibration)
        return small
    if request.budget:
        found = importance(model, calibration, request.depth_score)
        return search(model, found, calibration, *request.budget, shrink_to)
    shape = resolve(model, **request.cuts())
    if request.vocabulary is not None:
        rewritable_tokenizer(model)  # Raises if there is none to rewrite.
    return shrink_to(model, shape, _importance_for(model, request, calibration))


def _importance_for(model: keras.Model, request: Shrink, calibration: Data) -> Importance | None:
    """Returns the importance of a model's parts, or `None` if nothing goes that depends on it."""
    if not any(name in _MEASURED for name in request.cuts()):
        return None
    return importance(model, calibration, request.depth_score)


def prepare(model: keras.Model, request: Shrink) -> Any:
    """Returns a model of the shape that is asked for, with random weights, for `fill`.

    Args:
        model: The model to shrink.
        request: Numbers, no budget, and not the vocabulary.

    Raises:
        ValueError: If the family cannot have the shape.
    """
    _check_model(model, request)
    if request.experts is not None:
        return make_with_experts(model, experts_to_keep(model, request.experts))
    shape = resolve(model, **request.cuts())
    preprocessor = shrink_preprocessor(getattr(model, "preprocessor", None), None, shape.context)
    with strategy_scope(model):
        return with_backbone(model, build(model, shape), preprocessor)


def fill(model: keras.Model, small: keras.Model, request: Shrink, calibration: Data) -> None:
    """Copies the most important parts of a model into one that `prepare` returned.

    Args:
        model: The model to shrink.
        small: The smaller model.
        request: The same that `prepare` was given.
        calibration: See `shrink`.

    Raises:
        ValueError: If calibration data is missing or empty.
    """
    _check_model(model, request)
    if request.experts is not None:
        fill_experts(model, small, calibration)
    else:
        found = _importance_for(model, request, calibration)
        with strategy_scope(model):
            operate(model, small, choose(model, shape_of(small), found), found)
    record(small, *history_of(model), request)


def shrink_to(model: keras.Model, shape: Shape, found: Importance | None) -> Any:
    """Returns a new model of a given shape, made of the most important parts.

    Args:
        model: The model to cut.
        shape: A shape that its family can have.
        found: The importance of its parts; may be `None` if only positions go.
    """
    tokens, preprocessor = None, getattr(model, "preprocessor", None)
    if shape.vocabulary != shape_of(model).vocabulary:
        assert found is not None
        tokens = choose_tokens(rewritable_tokenizer(model), found.vocabulary, shape.vocabulary)
    preprocessor = shrink_preprocessor(preprocessor, tokens, shape.context)
    cut = choose(model, shape, found, tokens)
    with strategy_scope(model):
        small = with_backbone(model, build(model, shape), preprocessor)
        operate(model, small, cut, found)
    return small
