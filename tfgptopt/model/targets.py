"""Which weights of a model a technique acts on.

A target is one kernel or embedding table inside any Keras 3 model, at any depth of nesting, seen
as a matrix from inputs to outputs whatever the rank of the variable is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import keras

from tfgptopt.backend import require_tensorflow
from tfgptopt.model.experts import ExpertProduct, open_experts
from tfgptopt.model.repairing import never_called

require_tensorflow()

Key = TypeVar("Key")
Role = Literal["kernel", "embedding", "head"]
# What users give to choose targets: a regex on the path, a layer class, or a predicate.
Selector = str | type | Callable[["Target"], bool]


@dataclass(frozen=True, eq=False)
class Target:
    """One weight that a technique can act on.

    Attributes:
        layer: The layer that owns the weight.
        variable: The `keras.Variable`.
        path: The path of the variable in the model, as Keras prints it.
        role: `"kernel"` (Dense, EinsumDense), `"head"` (one of these with an output for each token
            of the largest table) or `"embedding"` (token and position tables).
        input_axes: Axes of the variable that a product sums over.
        output_axes: The other axes.
        row_axes: Axes of the layer's *input* that a product sums over.
        expert: Which expert of a mixture it is the matrix of. Defaults to `None`: all of them, one
            behind the other along the outputs, or a weight without experts.
    """

    layer: keras.Layer
    variable: keras.Variable
    path: str
    role: Role
    input_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    expert: int | None = None

    @property
    def key(self) -> tuple[int, int | None]:
        """What tells it from other weights, and from other experts of its own variable."""
        return id(self.variable), self.expert

    @property
    def parts(self) -> list[Target]:
        """The matrix of each expert as a target of its own; without experts the target itself."""
        if self.expert_axis is None or self.expert is not None:
            return [self]
        return [replace(self, expert=i) for i in range(int(self.variable.shape[0]))]

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for dimension in self.variable.shape:
            size *= int(dimension)
        return size if self.expert is None else size // int(self.variable.shape[0])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight as a matrix, `(inputs, outputs)`."""
        inputs = 1
        for axis in self.input_axes:
            inputs *= int(self.variable.shape[axis])
        return inputs, self.size // inputs

    @property
    def expert_axis(self) -> int | None:
        """Axis of the variable that counts the experts of a mixture, or `None`."""
        return 0 if isinstance(self.layer, ExpertProduct) else None

    def to_matrix(self, values: Any) -> Any:
        """Returns a tensor of the variable's shape as `(inputs, outputs)`, its own expert of it."""
        if self.expert is not None:
            values = values[self.expert : self.expert + 1]
        order = self.input_axes + self.output_axes
        return keras.ops.reshape(keras.ops.transpose(values, order), self.matrix_shape)

    def from_matrix(self, matrix: Any) -> Any:
        """Returns a tensor `(inputs, outputs)` in its shape; one expert keeps the axis of all."""
        order = self.input_axes + self.output_axes
        shape = [int(n) for n in self.variable.shape]
        shape[0] = shape[0] if self.expert is None else 1
        values = keras.ops.reshape(matrix, [shape[axis] for axis in order])
        return keras.ops.transpose(values, sorted(range(len(order)), key=order.__getitem__))

    def assign(self, matrix: Any) -> None:
        """Writes a matrix `(inputs, outputs)` into the variable; other experts stay as they are."""
        values = self.from_matrix(keras.ops.cast(matrix, "float32"))
        if self.expert is not None:
            every = keras.ops.convert_to_numpy(self.variable).copy()
            every[self.expert] = values[0]
            values = every
        self.variable.assign(values)


@dataclass(frozen=True)
class Skipped:
    """A layer with weights that was left out, and why."""

    path: str
    reason: str


def _einsum_axes(equation: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Reads the axes of an EinsumDense equation: kernel input, kernel output, input row."""
    operands, result = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    contracted = [label for label in kernel if label in inputs and label not in result]
    kernel_inputs = tuple(i for i, label in enumerate(kernel) if label in contracted)
    kernel_outputs = tuple(i for i, label in enumerate(kernel) if label not in contracted)
    ahead, dots, behind = inputs.partition("...")
    # Axes behind an ellipsis are counted from the end: the ellipsis has any number of axes.
    places = {label: i for i, label in enumerate(ahead)}
    places |= {label: i - len(behind) for i, label in enumerate(behind) if dots}
    rows = [places[label] for label in contracted]
    return kernel_inputs, kernel_outputs, tuple(rows)


def _unseen(layer: keras.Layer) -> Skipped | None:
    """Returns why the matrices of a layer of another kind are no targets, if it has some."""
    known = open_experts(layer)
    found = [v for v in layer._trainable_variables if id(v) not in known]
    matrices = [v for v in found if len(v.shape) > 1 and v.trainable]
    if not matrices:
        return None
    shapes = ", ".join("x".join(str(n) for n in v.shape) for v in matrices)
    path = matrices[0].path if len(matrices) == 1 else layer.path or layer.name
    return Skipped(
        path, f"{type(layer).__name__} with {shapes} is no Dense, EinsumDense or Embedding"
    )


def _describe(layer: keras.Layer) -> Target | Skipped | None:
    """Returns the target of one layer, or why it is none, or `None` for layers with nothing."""
    if not isinstance(
        layer, keras.layers.Dense | keras.layers.EinsumDense | keras.layers.Embedding
    ):
        return _unseen(layer)
    path = layer.path or layer.name
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    if not layer.built:
        return Skipped(path, "not built")
    if layer.dtype_policy.quantization_mode is not None:
        return Skipped(path, f"already quantized by Keras ({layer.dtype_policy.name})")
    if isinstance(layer, keras.layers.Embedding):
        variable = layer._embeddings
        role, axes = "embedding", ((1,), (0,), (-1,))
    elif isinstance(layer, keras.layers.EinsumDense):
        variable = layer._kernel
        role, axes = "kernel", _einsum_axes(layer.equation)
    else:
        variable = layer._kernel
        role, axes = "kernel", ((0,), (1,), (-1,))
    return Target(layer, variable, variable.path, role, *axes)  # type: ignore[arg-type]


def target_of(layer: keras.Layer) -> Target:
    """Returns the target of one layer, frozen or not.

    Raises:
        ValueError: If the layer has no weight to act on, with the reason.
    """
    found = _describe(layer)
    if isinstance(found, Target):
        return found
    reason = found.reason if found else "is no Dense, EinsumDense or Embedding"
    raise ValueError(f"{layer.path or layer.name}: {reason}")


def _layers_in_order(layer: keras.Layer, seen: set[int]) -> Iterator[keras.Layer]:
    """Yields a layer and all layers inside it, each once, in the order they were made."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    open_experts(layer)
    yield layer
    for inner in layer._layers:
        yield from _layers_in_order(inner, seen)


def _head_of(chosen: list[Target]) -> Target | None:
    """Returns the kernel that gives logits: its outputs are the tokens of the largest table."""
    sizes = [target.matrix_shape[1] for target in chosen if target.role == "embedding"]
    kernels = [target for target in chosen if target.role == "kernel"]
    # The last kernel first: a feed-forward network may be as wide as a table has rows.
    if kernels and kernels[-1].matrix_shape[1] in sizes:
        return kernels[-1]
    fitting = [kernel for kernel in kernels if kernel.matrix_shape[1] == max(sizes, default=0)]
    return fitting[0] if len(fitting) == 1 else None


def candidates(model: keras.Layer) -> Iterator[Target | Skipped]:
    """Yields every target of a model, frozen or not, and every candidate that is none."""
    layers = list(_layers_in_order(model, set()))
    idle = {id(inner) for layer in layers for inner in never_called(layer)}
    described = [
        Skipped(layer.path, "never called") if id(layer) in idle else _describe(layer)
        for layer in layers
    ]
    found = [item for item in described if item is not None]
    head = _head_of([item for item in found if isinstance(item, Target)])
    for item in found:
        yield replace(item, role="head") if isinstance(item, Target) and item is head else item


def walk(model: keras.Layer) -> Iterator[Target | Skipped]:
    """Yields every target of a model, and every candidate that is none, each shared layer once."""
    for found in candidates(model):
        if isinstance(found, Target) and getattr(found.layer, "lora_enabled", False):
            yield Skipped(found.path, "has LoRA adapters; merge them first")
        elif isinstance(found, Target) and not (found.layer.trainable and found.variable.trainable):
            yield Skipped(found.path, "frozen")
        else:
            yield found


def _matches(selector: Selector, target: Target) -> bool:
    if isinstance(selector, str):
        return re.search(selector, target.path) is not None
    if isinstance(selector, type):
        return isinstance(target.layer, selector)
    return bool(selector(target))


def select(
    model: keras.Layer,
    selector: Selector | None = None,
    roles: tuple[Role, ...] = ("kernel",),
    frozen: bool = False,
) -> list[Target]:
    """Returns the targets of a model that a selector chooses.

    Args:
        model: A built Keras model or layer.
        selector: A regular expression searched in the paths of weights, a layer class, or a
            callable from `Target` to bool. Defaults to `None`: every target with one of `roles`.
        roles: The roles that the default covers.
        frozen: Whether frozen weights, and those with LoRA adapters, are chosen too. Defaults to
            `False`.

    Returns:
        List of `Target`, in the order in which the model holds them.

    Raises:
        ValueError: If the model is not built, or nothing matches.

    Example:

    ```python
    select(model, r"feedforward")                      # by path
    select(model, keras.layers.EinsumDense)            # by class
    select(model, lambda target: target.size > 10_000)  # by anything
    ```
    """
    if not isinstance(model, keras.Layer):
        raise ValueError(
            f"Expected a Keras 3 model or layer. Received: {model!r} (of type {type(model)}). "
            "A tf_keras model has to be rebuilt with Keras 3."
        )
    if not model.built:
        raise ValueError(
            f"The model '{model.name}' is not built, so it has no weights yet. "
            "Call it on a batch, or `model.build(input_shape)`, first."
        )
    if isinstance(selector, str):
        try:
            re.compile(selector)
        except re.error as error:
            raise ValueError(
                f"`targets` is not a regular expression: {selector!r} ({error})"
            ) from None
    found = list(candidates(model) if frozen else walk(model))
    targets = [item for item in found if isinstance(item, Target)]
    if selector is None:
        chosen = [target for target in targets if target.role in roles]
    else:
        chosen = [target for target in targets if _matches(selector, target)]
    if not chosen:
        raise ValueError(_nothing_chosen(model, selector, targets, found))
    return chosen


def _nothing_chosen(
    model: keras.Layer,
    selector: Selector | None,
    chosen: list[Target],
    found: list[Target | Skipped],
) -> str:
    if chosen and selector is not None:
        names = ", ".join(target.path for target in chosen[:3])
        return (
            f"`targets={selector!r}` matches none of the {len(chosen)} weights of "
            f"'{model.name}'. They are named like: {names}"
        )
    skipped = "; ".join(f"{s.path}: {s.reason}" for s in found if isinstance(s, Skipped))
    return (
        f"The model '{model.name}' has no weight to act on (kernels of Dense and EinsumDense, "
        f"tables of Embedding). Skipped: {skipped or 'nothing'}"
    )


def check_regex(selector: Selector | None) -> str | None:
    """Returns a selector that can be written down.

    Raises:
        ValueError: If it is a class or a function.
    """
    if selector is not None and not isinstance(selector, str):
        raise ValueError(f"`targets` of a recipe is a regular expression. Received: {selector!r}")
    return selector


def regex_for(chosen: list[Target], default: list[Target]) -> str | None:
    """Returns the regular expression that selects exactly `chosen`, or `None` for the default."""
    if [t.path for t in chosen] == [t.path for t in default]:
        return None
    return "^(?:" + "|".join(re.escape(target.path) for target in chosen) + ")$"


def grouped(chosen: list[Target], key: Callable[[Target], Key]) -> list[tuple[Key, list[Target]]]:
    """Returns targets grouped by a key that can be compared, in the order of their appearance."""
    groups: list[tuple[Key, list[Target]]] = []
    for target in chosen:
        value = key(target)
        members = next((members for known, members in groups if known == value), None)
        if members is None:
            groups.append((value, [target]))
        else:
            members.append(target)
    return groups
