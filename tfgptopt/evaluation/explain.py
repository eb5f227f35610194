"""Which tokens of a prompt the next one hangs on, and whether compression changed that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.evaluation.artifacts import Artifact, InParts, KerasArtifact
from tfgptopt.evaluation.integrating import integrate

Method = Literal["occlusion", "integrated_gradients", "shap", "lime"]
_EXTRA = "Explaining with {} needs it: pip install 'tfgptopt[explain]'."
_AT_ONCE = 16
# Of each piece of the way of integrated gradients.
_POINTS = 8


@dataclass(frozen=True)
class Attribution:
    """How much each token of a prompt speaks for the next one.

    Attributes:
        tokens: Texts of the prompt's tokens, or their ids as text without a tokenizer.
        values: Of each, in nats of the next token's log-probability (of LIME: its weight in a
            linear model of the probability). Large ones speak for it, negative ones against it.
        target: Text of the next token that is explained.
        target_id: Its id.
        score: Its log-probability behind the prompt.
        baseline: That behind a prompt of which nothing is told.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    target: str
    target_id: int
    score: float
    baseline: float


def explain(
    artifact: Artifact,
    prompt: str | Sequence[int],
    method: Method = "occlusion",
    target: int | None = None,
    masked_id: int | None = None,
    samples: int = 64,
    seed: int = 0,
) -> Attribution:
    """Says how much each token of a prompt speaks for the next one.

    Args:
        artifact: What `open_artifact` gave; a Keras model for `"integrated_gradients"`.
        prompt: A text, or token ids, at least two.
        method: `"occlusion"`: how far the next token's log-probability falls when a token is
            replaced. `"integrated_gradients"`: gradients by embeddings, along the way from those of
            a prompt of which nothing is told (Keras models): from zeros, models that norms begin
            with jump at once. `"shap"`: Shapley values over permutations, through SHAP. `"lime"`: a
            linear model of replaced tokens, through LIME. The last two need the extra `explain`.
            Defaults to `"occlusion"`.
        target: Id of the next token to explain. Defaults to `None`: the likeliest.
        masked_id: Id that stands in for a token that is not told. Defaults to `None`: that of a
            space, or 0 without one.
        samples: Prompts that LIME reads, permutations of SHAP times four, or points on the way of
            integrated gradients, to which others are added where they do not sum to the difference.
            Defaults to `64`.
        seed: int. Of what is drawn. Defaults to `0`.

    Returns:
        `Attribution`.

    Raises:
        ImportError: If the library of a method is not installed.
        ValueError: If the prompt has fewer than two tokens, does not fit, or the method is unknown
            or cannot be used with the artifact.

    Example:

    ```python
    from tfgptopt.evaluation.artifacts import open_artifact

    found = explain(open_artifact("gpt.tflite"), "import os, sys")
    print(found.target, list(zip(found.tokens, found.values)))
    ```

    Reference: Sundararajan et al., 2017, "Axiomatic Attribution for Deep Networks"; Lundberg and
        Lee, 2017, "A Unified Approach to Interpreting Model Predictions"; Ribeiro et al., 2016,
        "Why Should I Trust You?".
    """
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {get_args(Method)}. Received: {method!r}")
    ids = _ids(artifact, prompt)
    if masked_id is None:
        masked_id = _space(artifact)
    if target is None:
        target = int(_logs(artifact, [ids])[0].argmax())
    ask = _Question(artifact, np.asarray(ids, np.int32), masked_id, target)
    score, baseline = ask(np.asarray([[True] * len(ids), [False] * len(ids)]))
    if method == "occlusion":
        values = score - ask(~np.eye(len(ids), dtype=bool))
    elif method == "integrated_gradients":
        values, score, baseline = _integrated_gradients(artifact, ids, masked_id, target, samples)
    elif method == "shap":
        values = _shap(ask, len(ids), samples, seed)
    else:
        values = _lime(ask, len(ids), samples, seed)
    return Attribution(
        tuple(_text(artifact, token) for token in ids),
        tuple(float(value) for value in values),
        _text(artifact, target),
        target,
        float(score),
        float(baseline),
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns Spearman's correlation of the ranks of two lists, in [-1, 1].

    Args:
        one, other: As long as each other, at least two.

    Raises:
        ValueError: If they are not.
    """
    if len(one) != len(other) or len(one) < 2:
        raise ValueError(
            f"Expected two lists of one length >= 2. Received: {len(one)}, {len(other)}"
        )
    first, second = (_ranks(np.asarray(values, np.float64)) for values in (one, other))
    spread = first.std() * second.std()
    if spread == 0:  # All alike in one of them: no order to compare.
        return float(np.array_equal(first, second))
    return float(((first - first.mean()) * (second - second.mean())).mean() / spread)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


@dataclass(frozen=True, eq=False)
class _Question:
    """Asks for the log-probability of the next token with tokens told or not."""

    artifact: Artifact
    ids: np.ndarray
    masked_id: int
    target: int

    def __call__(self, told: np.ndarray) -> np.ndarray:
        """Returns it for each row of booleans."""
        rows = np.where(np.asarray(told, bool), self.ids, self.masked_id).astype(np.int32)
        parts = [rows[i : i + _AT_ONCE] for i in range(0, len(rows), _AT_ONCE)]
        return np.concatenate([_logs(self.artifact, part)[:, self.target] for part in parts])


def _logs(artifact: Artifact, rows: Any) -> np.ndarray:
    """Returns logarithms of probabilities behind rows of ids, float64 `(rows, vocabulary)`."""
    rows = np.asarray(rows, np.int32)
    if isinstance(artifact, InParts):  # Only the last token needs the head.
        found = [part for row in rows for part in artifact.parts(row.tolist(), len(row) - 1)]
        last = np.concatenate(found).astype(np.float64)
    else:
        tokens = tf.constant(rows)
        logits = artifact.logits({"token_ids": tokens, "padding_mask": tf.ones_like(tokens)})
        last = np.asarray(logits[:, -1], np.float64)
    last -= last.max(-1, keepdims=True)
    return last - np.log(np.exp(last).sum(-1, keepdims=True))


def _ids(artifact: Artifact, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        if artifact.tokenizer is None:
            raise ValueError("The artifact has no tokenizer: give token ids.")
        begin = [] if artifact.start_token_id is None else [artifact.start_token_id]
        ids = [*begin, *artifact.tokenizer.encode(prompt, False)]
    else:
        ids = [int(token) for token in prompt]
    most = artifact.context_length
    if len(ids) < 2 or (most is not None and len(ids) > most):
        raise ValueError(
            f"A prompt to explain has 2 tokens at least, and {most or 'all'} of the context at "
            f"most. Received: {len(ids)}"
        )
    return ids


def _space(artifact: Artifact) -> int:
    found = [] if artifact.tokenizer is None else artifact.tokenizer.encode(" ", False)
    return found[0] if len(found) == 1 else 0


def _text(artifact: Artifact, token: int) -> str:
    return str(token) if artifact.tokenizer is None else artifact.tokenizer.decode([token])


def _integrated_gradients(
    artifact: Artifact, ids: list[int], masked_id: int, target: int, points: int
) -> tuple[np.ndarray, float, float]:
    """Returns attributions, and the scores at both ends of the way.

    Raises:
        ValueError: If the artifact is no Keras model with an embedding of tokens.
    """
    model = getattr(artifact, "model", None)
    table = getattr(getattr(model, "backbone", None), "token_embedding", None)
    if not isinstance(artifact, KerasArtifact) or table is None:
        raise ValueError(
            "Integrated gradients need a Keras model with `backbone.token_embedding`: explain a "
            f"file by 'occlusion' or 'shap'. Received: {artifact.kind}"
        )
    begin = tf.convert_to_tensor(table(tf.fill((1, len(ids)), masked_id)))
    way = tf.convert_to_tensor(table(tf.constant([ids], tf.int32))) - begin

    def some(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = begin + way * tf.cast(places[:, None, None], way.dtype)
        tokens = tf.constant([ids] * len(places), tf.int32)
        inputs = {"token_ids": tokens, "padding_mask": tf.ones_like(tokens)}
        with tf.GradientTape() as tape:
            tape.watch(points)
            with tokens_as_input(artifact.model), _embedding(table, points):
                logits = tf.cast(artifact.model(inputs, training=False), tf.float32)
            scores = tf.nn.log_softmax(logits[:, -1])[:, target]
        slopes = tf.reduce_sum(tape.gradient(scores, points) * way, axis=-1)
        return np.asarray(scores, np.float64), np.asarray(slopes, np.float64)

    def ask(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [some(places[i : i + _AT_ONCE]) for i in range(0, len(places), _AT_ONCE)]
        scores, slopes = zip(*found, strict=True)
        return np.concatenate(scores), np.concatenate(slopes)

    return integrate(ask, max(points // _POINTS, 1))


class _embedding:
    """Puts embeddings in the place of what a layer looks up, for a while."""

    def __init__(self, layer: keras.layers.Layer, embedded: tf.Tensor) -> None:
        self._layer, self._embedded = layer, embedded

    def __enter__(self) -> None:
        layer, embedded = self._layer, self._embedded
        looked_up: Callable[..., Any] = layer.call

        def call(inputs: Any, *args: Any, reverse: bool = False, **settings: Any) -> Any:
            if reverse or (args and args[0]):
                return looked_up(
                    inputs, *args, **({"reverse": True} if reverse else {}), **settings
                )
            return embedded

        object.__setattr__(layer, "call", call)

    def __exit__(self, *_: object) -> None:
        object.__delattr__(self._layer, "call")


def _shap(ask: _Question, length: int, samples: int, seed: int) -> np.ndarray:
    try:
        from shap import PermutationExplainer
    except ImportError:
        raise ImportError(_EXTRA.format("SHAP")) from None
    explainer = PermutationExplainer(ask, np.zeros((1, length)), seed=seed)
    evaluations = max(samples // 4, 1) * (2 * length + 1)
    found = explainer(np.ones((1, length)), max_evals=evaluations, silent=True)
    values: np.ndarray = np.asarray(found.values[0])
    return values


def _lime(ask: _Question, length: int, samples: int, seed: int) -> np.ndarray:
    try:
        from lime.lime_text import LimeTextExplainer
    except ImportError:
        raise ImportError(_EXTRA.format("LIME")) from None
    words = [f"w{i}" for i in range(length)]

    def probabilities(texts: Sequence[str]) -> np.ndarray:
        told = np.asarray([[word in set(text.split()) for word in words] for text in texts])
        likely = np.exp(ask(told))
        return np.stack([1 - likely, likely], axis=1)

    explainer = LimeTextExplainer(split_expression=r"\s+", bow=False, random_state=seed)
    found = explainer.explain_instance(
        " ".join(words), probabilities, labels=(1,), num_features=length, num_samples=samples
    )
    values = np.zeros(length)
    for index, weight in found.as_map()[1]:
        values[index] = weight
    return values
