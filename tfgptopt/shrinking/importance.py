"""How important the parts of a model are on given data: layers, heads, neurons, features."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.batches import batches_of
from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.data.text import as_tokens, is_text
from tfgptopt.families import Layout, Part, blocks_of, follow
from tfgptopt.model.overriding import overriding
from tfgptopt.model.types import Data
from tfgptopt.shrinking.families import family_of
from tfgptopt.shrinking.shapes import check_depth_score
from tfgptopt.terminal.progress import track


@dataclass(frozen=True, eq=False)
class Importance:
    """What `importance` found. Scores compare within an array; higher is more important.

    Attributes:
        depth: Of each decoder layer, `(depth,)`: one minus the mean cosine of what goes in and
            what comes out; or, measured by loss, how much the loss grows without the layer.
        heads: Of each head of each layer, `(depth, heads)`.
        kv_heads: Of each group of heads that share keys and values, `(depth, kv_heads)`.
        feedforward: Of each neuron of each layer, `(depth, feedforward)`.
        width: Of each feature of the residual stream, `(width,)`.
        vocabulary: How often each token occurs in the data, `(vocabulary,)`.
        energies: Mean square of each feature in front of each norm, by path of the norm.
        loss: Of the next token on the data, in nats; `None` if it was not needed.
    """

    depth: np.ndarray
    heads: np.ndarray
    kv_heads: np.ndarray
    feedforward: np.ndarray
    width: np.ndarray
    vocabulary: np.ndarray
    energies: dict[str, np.ndarray]
    loss: float | None = None

    def table(self) -> Any:
        """Returns a `rich` table with a row for each layer: its score, and the spread inside."""
        from rich.table import Table

        table = Table(padding=(0, 1))
        for heading in ("layer", "score", "weakest head", "strongest", "neurons below 10 %"):
            table.add_column(heading, justify="right")
        for i, score in enumerate(self.depth):
            heads, neurons = self.heads[i], self.feedforward[i]
            weak = (neurons < 0.1 * neurons.max()).mean()
            table.add_row(
                str(i), f"{score:.4f}", f"{heads.min():.3g}", f"{heads.max():.3g}", f"{weak:.0%}"
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(width=80, file=text).print(self.table())
        return text.getvalue()

    def plot(self) -> Any:
        """Returns a `matplotlib` figure: layers, heads, and what is left as neurons, features and
        tokens go."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), layout="constrained")
        layers, heads, neurons, rest = figure.subplots(2, 2).flatten()
        layers.bar(range(len(self.depth)), self.depth, color="#3566c9")
        layers.set(title="decoder layers", xlabel="layer", ylabel="score")
        shares = self.heads / np.maximum(self.heads.max(axis=1, keepdims=True), 1e-30)
        image = heads.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        heads.set(title="heads, of the strongest in the layer", xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=heads)
        for i, row in enumerate(self.feedforward):
            color = (0.2, 0.4, 0.8, 0.3 + 0.7 * i / len(self.feedforward))
            neurons.plot(*_kept(row), color=color)
        neurons.set(title="neurons of each layer", xlabel="share kept", ylabel="importance kept")
        rest.plot(*_kept(self.width), label="features", color="#d9762b")
        rest.plot(*_kept(self.vocabulary), label="tokens", color="#2b9b6c")
        rest.set(title="width and vocabulary", xlabel="share kept", ylabel="importance kept")
        rest.legend(frameon=False)
        return figure


def _kept(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns shares of parts kept, the best first, and of the sum of their scores."""
    best = np.sort(scores)[::-1].cumsum()
    return np.arange(1, len(best) + 1) / len(best), best / max(best[-1], 1e-30)


class _Watcher:
    """Sums what goes through the layers of a model, real tokens only."""

    def __init__(self, family: Layout, backbone: keras.Model) -> None:
        self.family, self.backbone = family, backbone
        self.blocks = blocks_of(backbone)
        self.cosines = np.zeros(len(self.blocks))
        self.squares: dict[int, np.ndarray] = {}
        self.outputs: dict[int, np.ndarray] = {}
        self.tokens = 0.0
        self._real: Any = None
        self._seen = {id(block): i for i, block in enumerate(self.blocks)}
        parts = [family.output, family.down]
        self._dense = {id(p.of(b)): p.of(b) for b in self.blocks for p in parts}
        norms = [p.of(b) for b in self.blocks for p in family.of_kind("norm", "post_norm")]
        final = follow(backbone, family.final_norm)
        self._norms = {id(n): n for n in [*norms, final] if n is not None}

    def layers(self) -> list[keras.Layer]:
        return [*self.blocks, *self._dense.values(), *self._norms.values()]

    def batch(self, real: tf.Tensor) -> None:
        """Says which tokens of the next batch are real."""
        self._real = tf.cast(real, tf.float32)
        self.tokens += float(tf.reduce_sum(self._real))

    def _sum(self, values: Any) -> np.ndarray:
        """Returns the sum over real tokens of `(batch, tokens, ...)`."""
        return np.asarray(tf.einsum("bt...,bt->...", values, self._real), np.float64)

    def wrap(self, layer: keras.Layer) -> Any:
        call, key = layer.call, id(layer)

        def watched(inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
            result = call(inputs, *args, **kwargs)
            x = tf.cast(inputs, tf.float32)
            if key in self._seen:
                y = tf.cast(result[0] if isinstance(result, tuple) else result, tf.float32)
                lengths = tf.norm(x, axis=-1) * tf.norm(y, axis=-1)
                cosine = tf.math.divide_no_nan(tf.reduce_sum(x * y, axis=-1), lengths)
                self.cosines[self._seen[key]] += float(self._sum(cosine))
                return result
            if key in self._norms:
                squares = self._sum(tf.square(tf.cast(result, tf.float32)))
                self.outputs[key] = self.outputs.get(key, 0.0) + squares
                if isinstance(layer, keras.layers.LayerNormalization):
                    x -= tf.reduce_mean(x, axis=-1, keepdims=True)
            self.squares[key] = self.squares.get(key, 0.0) + self._sum(tf.square(x))
            return result

        return watched


def _kernel(layer: keras.Layer) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(layer._kernel), np.float64)


def _norms_along(values: np.ndarray, axes: tuple[str, ...], *kept: str) -> np.ndarray:
    """Returns the squared norm of a kernel over all axes but those kept, in the order kept."""
    others = tuple(i for i, axis in enumerate(axes) if axis not in kept)
    left = [axis for axis in axes if axis in kept]
    squares = (values**2).sum(axis=others)
    return squares.transpose([left.index(axis) for axis in kept])


def _of_inputs(watcher: _Watcher, part: Part, kept: tuple[str, ...]) -> np.ndarray:
    """Returns, for each block, the size of what each input adds to the output of a part."""
    scores = []
    for block in watcher.blocks:
        layer = part.of(block)
        squares = watcher.squares[id(layer)] / watcher.tokens
        scores.append(np.sqrt(squares * _norms_along(_kernel(layer), part.axes, *kept)))
    return np.stack(scores)


def _of_width(watcher: _Watcher) -> np.ndarray:
    """Returns how much each feature gives to what reads the stream, all readers alike."""
    family, backbone = watcher.family, watcher.backbone
    readers = family.of_kind("reads", "query")
    total = np.zeros(backbone.hidden_dim)
    norms = family.of_kind("norm")
    for block in watcher.blocks:
        for i, norm in enumerate(norms):
            # The first norm is read by attention, the second by the feed-forward network.
            wanted = "head_dim" if i == 0 else "feedforward"
            weights = sum(
                _norms_along(_kernel(part.of(block)), part.axes, "width")
                for part in readers
                if wanted in part.axes and part.of(block) is not None
            )
            total += _share(watcher.outputs[id(norm.of(block))] * weights)
    embedding = follow(backbone, family.token_embedding)
    table = np.asarray(
        embedding.embeddings if embedding.tie_weights else embedding.reverse_embeddings, np.float64
    )
    weights = (table**2).sum(axis=0 if embedding.tie_weights else 1)
    return total + _share(watcher.outputs[id(follow(backbone, family.final_norm))] * weights)


def _share(squares: np.ndarray) -> np.ndarray:
    sizes = np.sqrt(squares)
    return sizes / max(sizes.sum(), 1e-30)


def read_data(model: keras.Model, data: Data) -> list[dict[str, Any]]:
    """Returns calibration data as batches of `token_ids` and `padding_mask`.

    Raises:
        ValueError: If there is none, it has no token ids, or the model cannot read them.
    """
    backbone = getattr(model, "backbone", model)
    if data is None:
        raise ValueError("`calibration` is needed to see which parts matter. Give some batches.")
    if is_text(data):
        data = as_tokens(data, getattr(model, "preprocessor", None), None)
    found = []
    for inputs in batches_of(data):
        if not isinstance(inputs, dict):
            inputs = {"token_ids": inputs}
        if "token_ids" not in inputs:
            raise ValueError(f"The calibration data has no 'token_ids'. Received: {list(inputs)}")
        tokens = tf.convert_to_tensor(inputs["token_ids"])
        _check_tokens(backbone, tokens)
        mask = inputs.get("padding_mask")
        mask = tf.ones_like(tokens) if mask is None else tf.cast(mask, tf.int32)
        found.append({"token_ids": tokens, "padding_mask": mask})
    if not any(tf.reduce_any(batch["padding_mask"] != 0) for batch in found):
        raise ValueError("The calibration data is empty: it has nothing but padding.")
    return found


def _check_tokens(backbone: keras.Model, tokens: tf.Tensor) -> None:
    if not tokens.dtype.is_integer or tokens.shape.rank != 2:
        raise ValueError(
            "Calibration data needs token ids as ints of shape (batch, tokens). Received: "
            f"{tokens.dtype.name} of shape {tuple(tokens.shape)}"
        )
    size = backbone.vocabulary_size
    if tf.size(tokens) and not (tf.reduce_min(tokens) >= 0 and tf.reduce_max(tokens) < size):
        raise ValueError(
            f"Calibration data has token ids from {int(tf.reduce_min(tokens))} to "
            f"{int(tf.reduce_max(tokens))}, and the model has {size} tokens. Is it of another "
            "tokenizer?"
        )
    positions = getattr(backbone, "max_sequence_length", None)
    if positions is not None and tokens.shape[1] > positions:
        raise ValueError(
            f"Calibration data has windows of {tokens.shape[1]} tokens, and the model reads "
            f"{positions} at most. Cut them to that."
        )


def next_token_loss(model: keras.Model, batches: list[Any]) -> float:
    """Returns the mean loss of a causal LM for each next token of batches, in nats.

    Raises:
        ValueError: If no token follows another.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def of_batch(batch: Data) -> tuple[tf.Tensor, tf.Tensor]:
        logits = tf.cast(model(batch, training=False), tf.float32)[:, :-1]
        real = tf.cast(batch["padding_mask"][:, 1:], tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["token_ids"][:, 1:], logits)
        return tf.reduce_sum(losses * real), tf.reduce_sum(real)

    with tokens_as_input(model):
        sums = np.sum([[float(x) for x in of_batch(batch)] for batch in batches], axis=0)
    if not sums[1]:
        raise ValueError("The calibration data has no token that follows another.")
    return float(sums[0] / sums[1])


def _loss_when_skipped(model: keras.Model, blocks: list[Any], batches: list[Any]) -> np.ndarray:
    """Returns for each block the loss without it."""

    def skip(inputs: tf.Tensor, *args: object, **kwargs: object) -> Any:
        return inputs

    losses = []
    for block in track(blocks, "Skipping each layer"):
        with overriding([(block, "call", skip)]):
            losses.append(next_token_loss(model, batches))
    return np.array(losses)


def importance(model: keras.Model, data: Data, depth_score: str = "influence") -> Importance:
    """Measures how much each part of a model does on given data.

    Heads, neurons and features count by the size of what they add, which is that of their
    activations times that of the weights behind them. Padding is left out.

    Args:
        model: A causal LM of KerasHub of a family that can be shrunk.
        data: Text, or batches as `fit` reads them: a finite `tf.data.Dataset` or arrays.
        depth_score: `"influence"`: how much a layer turns what goes through it; or `"loss"`: how
            much the loss grows when a layer is skipped, which runs the model once for each layer.
            Defaults to `"influence"`.

    Returns:
        `Importance`, with a `table()` and a `plot()`.

    Raises:
        ValueError: If the family cannot be shrunk, or there is no data.

    Example:

    ```python
    found = tfgptopt.shrinking.importance(gpt, corpus.train.take(8))
    print(found)
    found.plot().savefig("importance.png")
    ```

    Reference: Muralidharan et al., 2024, "Compact Language Models via Pruning and Knowledge
    Distillation" (https://arxiv.org/abs/2407.14679); Men et al., 2024, "ShortGPT"
    (https://arxiv.org/abs/2403.03853), for the influence of layers.
    """
    family = family_of(model)
    check_depth_score(depth_score)
    batches = read_data(model, data)
    backbone = getattr(model, "backbone", model)
    watcher = _Watcher(family, backbone)
    counts = np.zeros(backbone.vocabulary_size)
    with overriding((layer, "call", watcher.wrap(layer)) for layer in watcher.layers()):
        for batch in track(batches, "Reading the calibration data"):
            real = batch["padding_mask"] != 0
            watcher.batch(real)
            seen = tf.boolean_mask(batch["token_ids"], real)
            counts += np.bincount(seen.numpy(), minlength=len(counts))
            backbone(batch, training=False)
    depth, loss = 1.0 - watcher.cosines / watcher.tokens, None
    if depth_score == "loss":
        loss = next_token_loss(model, batches)
        depth = _loss_when_skipped(model, watcher.blocks, batches) - loss
    heads = _of_inputs(watcher, family.output, ("heads", "head_dim"))
    heads = np.sqrt((heads**2).sum(-1))
    kv_heads = heads.shape[1] if family.kv_heads is None else getattr(backbone, family.kv_heads)
    groups = heads.reshape(len(heads), kv_heads, -1)
    return Importance(
        depth=depth,
        heads=heads,
        kv_heads=np.sqrt((groups**2).sum(-1)),
        feedforward=_of_inputs(watcher, family.down, ("feedforward",)),
        width=_of_width(watcher),
        vocabulary=counts,
        energies={n.path: watcher.squares[id(n)] / watcher.tokens for n in watcher._norms.values()},
        loss=loss,
    )
