"""How each weight of a dressed layer is rounded, and the scales that are kept for it."""

from __future__ import annotations

import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.model import carrying
from tfgptopt.model.current import current, has_adapters
from tfgptopt.model.targets import Target
from tfgptopt.quantization import rounding
from tfgptopt.quantization.rounding import Grid
from tfgptopt.quantization.specs import Spec

_ATTRIBUTE = "_tfgptopt_rounders"


class Quantizer(keras.layers.Layer):
    """Rounds one weight: computes its scale, or keeps one.

    It hangs on the layer that has the weight, outside of Keras' tracking, so that the layer has
    the variables of a plain one; Keras saves a kept scale beside them, where a plain layer ignores
    it.

    Args:
        layer: The layer that has the weight.
        variable: The weight.
        grid: What it is rounded to.
        method: How its scale is found: `"absmax"`, `"mse"` or `"learned"`.
    """

    def __init__(
        self, layer: keras.Layer, variable: keras.Variable, grid: Grid, method: str
    ) -> None:
        super().__init__(name="quantizer")
        self.built = True
        # Not through Keras' own __setattr__: the variables are the layer's, or nobody's.
        self._layer = weakref.ref(layer)  # Not a layer inside this one.
        object.__setattr__(self, "variable", variable)
        object.__setattr__(self, "kept", None)
        # The rounded weights, where they need not be made: while weights that are frozen train
        # along, and while a SavedModel is traced, which makes them from stored integers.
        object.__setattr__(self, "given", None)
        object.__setattr__(self, "_made", None)
        self.grid = grid
        self.method = method
        self._loaded: Any = None

    def compute_scale(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the scale of float32 weights: the one kept, or else found by the method."""
        if self.kept is not None:
            return self.grid.representable(tf.convert_to_tensor(self.kept.value))
        return self._found(weights)

    def _found(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the scale that the method finds."""
        find = rounding.absmax_scale if self.method == "absmax" else rounding.mse_scale
        return find(weights, self.grid)

    def hold(self, weights: tf.Tensor, scale: tf.Tensor | None = None) -> None:
        """Keeps a scale from now on: one loaded from a checkpoint, that given, or that of now.

        Call it in the scope of the model's strategy.
        """
        if scale is None:
            scale = self.compute_scale(weights)
        if self.kept is None:
            kept = keras.Variable(scale, trainable=False, dtype="float32", name="scale")
            object.__setattr__(self, "kept", kept)
        else:
            self.kept.assign(scale)
        self._restore()

    @property
    def has_scale(self) -> bool:
        """Whether it keeps a scale, or will keep one that a checkpoint had."""
        return self.kept is not None or self._loaded is not None

    def _restore(self) -> None:
        if self._loaded is None or self.kept is None:
            return
        if self._loaded.shape == tuple(self.kept.shape):
            self.kept.assign(self._loaded)
        self._loaded = None

    def snapshot(self) -> tuple[np.ndarray | None]:
        """Returns the kept scale, or that there is none, to be restored with the weights."""
        return (None if self.kept is None else keras.ops.convert_to_numpy(self.kept.value),)

    def restore(self, snapshot: tuple[np.ndarray | None] | None) -> None:
        """Puts a scale back beside weights that were restored.

        Where nothing is known of them, the scale that is there is what they are rounded with.
        """
        weights = current(self._layer(), self.variable)
        if snapshot is not None and self.kept is not None:
            (scale,) = snapshot
            # Without one it has been frozen since.
            self.kept.assign(self._found(weights) if scale is None else scale)
        if self.given is not None:
            self.give(self.rounded(weights))

    def give(self, rounded: tf.Tensor | None) -> None:
        """Says what the rounded weights are, or that they have to be made. Trace again then."""
        if rounded is not None and self._made is not None:
            self._made.assign(rounded)  # Steps that were traced with it find it again.
        elif rounded is not None:
            object.__setattr__(self, "_made", tf.Variable(rounded, trainable=False))
        object.__setattr__(self, "given", None if rounded is None else self._made)

    def rounded(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns rounded float32 weights, without a gradient."""
        integers, scale = rounding.quantize(weights, self.grid, self.compute_scale(weights))
        return rounding.dequantize(integers, scale, self.grid)

    def fake_quantize(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns rounded weights with a straight-through gradient."""
        needs_clipping = self.kept is not None or self.method != "absmax"
        return rounding.fake_quantize(
            weights,
            self.grid,
            self.compute_scale if needs_clipping else None,
            # The gradient of a learned scale is made of the gradients of all its weights.
            pass_clipped=self.method == "learned",
        )

    def save_own_variables(self, store: Any) -> None:
        """Writes the kept scale."""
        if self.kept is not None:
            store["scale"] = keras.ops.convert_to_numpy(self.kept.value)

    def load_own_variables(self, store: Any) -> None:
        """Reads a kept scale; a checkpoint of a plain layer has none."""
        if "scale" in store.keys():  # noqa: SIM118
            self._loaded = np.asarray(store["scale"])
            self._restore()


def quantizers_of(layer: keras.Layer) -> list[Quantizer]:
    """Returns how the weights of a layer are rounded: none for a plain layer."""
    return list(getattr(layer, _ATTRIBUTE, {}).values())


def grids_of(target: Target, spec: Spec) -> list[tuple[Any, Grid]]:
    """Returns the variables of a target's layer that are rounded, with what they are rounded to."""
    axes = target.input_axes
    if target.role == "kernel":
        return [(target.variable, Grid(spec.bits, axes, spec.block_size))]
    bits, size = spec.embedding_bits, spec.embedding_block_size
    found = [(target.variable, Grid(bits, axes, size))]
    own_head = getattr(target.layer, "reverse_embeddings", None)
    if target.role == "embedding" and own_head is not None:
        found.append((own_head, Grid(bits, (0,), size)))
    return found


def row_blocks_of(target: Target, spec: Spec) -> int:
    """Returns how many scales a row of inputs has: one for tables and heads, which are whole."""
    return spec.activation_blocks if target.role == "kernel" else 1


def attach(target: Target, spec: Spec) -> None:
    """Hangs quantizers on the layer of a target, which keep those that are there."""
    layer = target.layer
    present: dict[str, Quantizer] = getattr(layer, _ATTRIBUTE, {})
    made: dict[str, Quantizer] = {}
    for name, (variable, grid) in zip(("main", "head"), grids_of(target, spec), strict=False):
        old = present.get(name)
        if old is None or (old.grid, old.method) != (grid, spec.scale):
            old = Quantizer(layer, variable, grid, spec.scale)
        made[name] = old
    # Keras looks for what to save among the attributes of a layer, dictionaries included.
    object.__setattr__(layer, _ATTRIBUTE, made)
    carrying.attach(layer, list(made.values()))


def detach(layer: keras.Layer) -> None:
    """Takes the quantizers off a layer."""
    if hasattr(layer, _ATTRIBUTE):
        object.__delattr__(layer, _ATTRIBUTE)
        carrying.detach(layer)


def check_fits(chosen: list[Target], spec: Spec) -> None:
    """Raises unless weights can be rounded to a spec.

    Raises:
        ValueError: If a weight is NaN or infinite, a block does not divide its inputs or a part of
            them, or a scale is to be learned for a weight that is frozen.
    """
    inputs = {t.path: t.matrix_shape[0] for t in chosen if t.role == "kernel"}
    if inputs:
        _check_divides(inputs, spec)
    size = spec.embedding_block_size
    for target in chosen:
        width = target.matrix_shape[0]
        if target.role != "kernel" and size is not None and width % size:
            fitting = [n for n in range(32, width + 1, 32) if width % n == 0]
            raise ValueError(
                f"`embedding_block_size` must divide the width of {target.path}, which is {width}. "
                f"Received: embedding_block_size={size}. Of the multiples of 32, "
                f"{fitting or 'none'} do. Give such a one, or None."
            )
    for target in chosen:
        if not np.isfinite(keras.ops.convert_to_numpy(target.variable.value)).all():
            raise ValueError(f"{target.path} is NaN or infinite, so it has no scale.")
        if spec.scale == "learned" and has_adapters(target.layer):
            raise ValueError(
                f"{target.path} has LoRA adapters, and a learned scale needs the gradient of the "
                'weight itself. Use `scale="mse"`, or merge the adapters first.'
            )


def _check_divides(inputs: dict[str, int], spec: Spec) -> None:
    """Raises unless blocks of weights, and of activations, divide the inputs of each weight."""
    size, parts = spec.block_size, spec.activation_blocks
    numbers, least = inputs.values(), min(inputs.values())
    wrong = {path: n for path, n in inputs.items() if size is not None and n % size}
    if wrong:
        fitting = [n for n in range(32, least + 1, 32) if not any(count % n for count in numbers)]
        path, count = next(iter(wrong.items()))
        raise ValueError(
            f"`block_size` must divide the inputs of each weight. {path} has {count}. Received: "
            f"block_size={size}. Of the multiples of 32, {fitting or 'none'} divide the inputs of "
            "all chosen weights. Give such a one, None, or other `targets`."
        )
    whole = size or 2 if spec.bits < 8 else 1  # Half a byte begins no row.
    wrong = {path: n for path, n in inputs.items() if parts > 1 and n % (parts * whole)}
    if wrong:
        fitting = [n for n in range(1, min(least, 64) + 1)
                   if not any(count % (n * whole) for count in numbers)]  # fmt: skip
        path, count = next(iter(wrong.items()))
        blocks = f" into whole blocks of {whole}" if whole > 1 else ""
        raise ValueError(
            f"`activation_blocks` must divide the inputs of each weight{blocks}. {path} has "
            f"{count}. Received: activation_blocks={parts}. Up to 64, {fitting or 'none'} do for "
            "all chosen weights. Give such a one, or other `targets`."
        )
