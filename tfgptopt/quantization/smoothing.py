"""Moves the scale of features from the inputs of products into their weights, or back.

A product whose input features differ much in size is hard to round: large features cost the small
ones their precision. Dividing a feature by a factor where it is made, and multiplying the weights
that read it by the same, changes nothing in floats. Where features are made is found by watching
the model run, and every such pair is tried before it is used: no family has to be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.blocks import recorded_calls, targets_by_block
from tfgptopt.calibration.watching import short
from tfgptopt.model.current import has_adapters
from tfgptopt.model.targets import Target, candidates
from tfgptopt.model.types import Data

# How far what a product gives may move when only the roundings of floats change.
_TOLERANCE = 2e-3


@dataclass(frozen=True, eq=False)
class Pair:
    """Where features are made, and the weights that read them.

    Attributes:
        producer: A normalization with a factor for each feature, or the kernel of a product.
        consumers: Kernels that read what it gives, and nothing else reads it.
        channels: For each input of the consumers, the feature of the producer.
        first: Which output of a product is the first feature: in front there may be gates.
    """

    producer: Any
    consumers: tuple[Target, ...]
    channels: np.ndarray
    first: int = 0

    def fold(self, factors: np.ndarray) -> None:
        """Divides the features by factors, and multiplies the weights that read them.

        Args:
            factors: Positive float array, one for each feature of the producer.
        """
        for target in self.consumers:
            rows = factors[self.channels][:, np.newaxis]
            matrix = target.to_matrix(target.variable.value).numpy() * rows
            target.assign(matrix)
        if isinstance(self.producer, Target):
            _divide_outputs(self.producer, factors, self.first)
        else:
            _divide_norm(self.producer, factors)

    @property
    def features(self) -> int:
        """Number of features of the producer."""
        return int(self.channels.max()) + 1


def _divide_outputs(target: Target, factors: np.ndarray, first: int) -> None:
    matrix = target.to_matrix(target.variable.value).numpy().copy()
    matrix[:, first : first + len(factors)] /= factors
    target.assign(matrix)
    bias = getattr(target.layer, "bias", None)
    if bias is not None:
        bias.assign(keras.ops.convert_to_numpy(bias) / factors.reshape(bias.shape))


def gain_of(norm: keras.Layer) -> Any:
    """Returns the factors of a normalization, a variable, or `None`."""
    for name in ("gamma", "scale"):
        variable = getattr(norm, name, None)
        if isinstance(variable, keras.Variable) and len(variable.shape) == 1:
            return variable
    return None


def _divide_norm(norm: keras.Layer, factors: np.ndarray) -> None:
    variable, offset = gain_of(norm), _offset(norm)
    values = keras.ops.convert_to_numpy(variable)
    variable.assign((values + offset) / factors - offset)
    beta = getattr(norm, "beta", None)
    if isinstance(beta, keras.Variable):
        beta.assign(keras.ops.convert_to_numpy(beta) / factors)


def _offset(norm: keras.Layer) -> float:
    """Returns what a normalization adds to its factors: 1 in Gemma, else 0."""
    variable = gain_of(norm)
    values = keras.ops.convert_to_numpy(variable)
    inputs = tf.random.stateless_normal((4, len(values)), (0, 1))
    beta = getattr(norm, "beta", None)
    without = 0.0 if not isinstance(beta, keras.Variable) else keras.ops.convert_to_numpy(beta)
    variable.assign(np.zeros_like(values))
    try:
        left = np.abs(keras.ops.convert_to_numpy(norm(inputs)) - without).max()
    finally:
        variable.assign(values)
    return 1.0 if left > 1e-3 else 0.0


class _Probe:
    """Tells whether folding pairs leaves what a model computes as it is.

    Args:
        model: A built Keras 3 model.
        batch: Inputs of it.
        tried: What came out of the first trials, which are not made again. Others are added.
    """

    def __init__(self, model: keras.Layer, batch: Data, tried: list[bool]) -> None:
        self._model, self._batch = model, batch
        self._known, self._tried = list(reversed(tried)), tried
        kernels = [t for t in candidates(model) if isinstance(t, Target) and t.role != "embedding"]
        self._layers = [model, *(target.layer for target in kernels)]
        self._expected: list[tuple[keras.Layer, np.ndarray]] = []
        self._random = np.random.default_rng(0)

    def _results(self) -> list[tuple[keras.Layer, np.ndarray]]:
        """Returns what each product and the model give, in the order of the calls."""
        calls = recorded_calls(self._model, self._layers, self._batch)
        return [
            (layer, np.asarray(part, np.float32))
            for layer, _, result in calls
            for part in tf.nest.flatten(result)
        ]

    def holds(self, pairs: list[Pair]) -> bool:
        """Tries pairs with random factors. The weights are as they were afterwards."""
        if self._known:
            return self._known.pop()
        self._tried.append(self._try(pairs))
        return self._tried[-1]

    def _try(self, pairs: list[Pair]) -> bool:
        self._expected = self._expected or self._results()
        variables = {id(v): v for pair in pairs for v in _touched(pair)}
        before = {key: keras.ops.convert_to_numpy(v) for key, v in variables.items()}
        # A product whose features are divided gives other ones, as it should.
        divided = {id(p.producer.layer) for p in pairs if isinstance(p.producer, Target)}
        try:
            for pair in pairs:
                pair.fold(self._random.uniform(0.5, 2.0, pair.features).astype(np.float32))
            found = self._results()
        finally:
            for key, variable in variables.items():
                variable.assign(before[key])
        return all(
            bool(np.abs(now - expected).max() <= _TOLERANCE * expected.std())
            for (layer, expected), (_, now) in zip(self._expected, found, strict=True)
            if id(layer) not in divided
        )


def _touched(pair: Pair) -> Iterator[Any]:
    for target in pair.consumers:
        yield target.variable
    if isinstance(pair.producer, Target):
        yield pair.producer.variable
        if getattr(pair.producer.layer, "bias", None) is not None:
            yield pair.producer.layer.bias
        return
    yield gain_of(pair.producer)
    if isinstance(getattr(pair.producer, "beta", None), keras.Variable):
        yield pair.producer.beta


def find_pairs(
    model: keras.Layer, chosen: list[Target], batch: Data, tried: list[bool] | None = None
) -> list[Pair]:
    """Returns where the scale of features can be moved in a model.

    Args:
        model: A built Keras 3 model.
        chosen: Kernels whose inputs may be scaled.
        batch: Inputs of the model.
        tried: What came out of each trial, if that is known; else it is added. Defaults to `None`:
            it is not known.

    Returns:
        Pairs that leave what the model computes as it is, each of which was tried.
    """
    chosen = [t for t in chosen if not has_adapters(t.layer)]
    batch = short(model, batch)
    probe = _Probe(model, batch, [] if tried is None else tried)
    norms = _norm_pairs(model, chosen, batch)
    kept = norms if probe.holds(norms) else [pair for pair in norms if probe.holds([pair])]
    return kept + _product_pairs(model, chosen, probe)


def _norm_pairs(model: keras.Layer, chosen: list[Target], batch: Data) -> list[Pair]:
    """Returns normalizations with the kernels that read what they give."""
    by_layer = {id(target.layer): target for target in chosen}
    norms = [
        layer
        for layer in model._flatten_layers()
        if "norm" in type(layer).__name__.lower() and gain_of(layer) is not None
    ]
    calls = recorded_calls(model, [*norms, *(t.layer for t in chosen)], batch)
    made = [(layer, result) for layer, _, result in calls if id(layer) not in by_layer]
    times = [layer for layer, _ in made]
    pairs = []
    for norm, result in made:
        readers = [by_layer[id(x)] for x, args, _ in calls
                   if id(x) in by_layer and args and args[0] is result]  # fmt: skip
        width = int(gain_of(norm).shape[0])
        whole = all(target.matrix_shape[0] == width for target in readers)
        if readers and whole and times.count(norm) == 1:
            pairs.append(Pair(norm, tuple(readers), np.arange(width)))
    return pairs


def _product_pairs(model: keras.Layer, chosen: list[Target], probe: _Probe) -> list[Pair]:
    """Returns products with the one that reads what they give, through a linear function."""
    found: list[Pair] = []
    known: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for block in targets_by_block(model, chosen):
        experts = [target for target in block if target.expert_axis is not None]
        block = [target for target in block if target.expert_axis is None]
        for way in _expert_pairs(experts):
            found += way if probe.holds(way) else []
        shape = tuple((t.matrix_shape, type(t.layer).__name__) for t in block)
        pairs = {
            (i, j): _product_pair(block[i], block[j])
            for i in range(len(block))
            for j in range(len(block))
            if i != j
        }
        possible = {places: pair for places, pair in pairs.items() if pair is not None}
        # Blocks that look alike are alike: all are tried together in the end.
        if shape not in known:
            known[shape] = [places for places, pair in possible.items() if probe.holds([pair])]
        found += [possible[places] for places in known[shape]]
    if found and not probe.holds(found):
        found = [pair for pair in found if probe.holds([pair])]
    return found


def _expert_pairs(experts: list[Target]) -> Iterator[list[Pair]]:
    """Yields ways in which the neurons of experts may be scaled, each a pair for each expert.

    What goes into experts is not scaled: their router reads the same.
    """
    # Ways in read tokens, the way out reads the neurons of each expert.
    ways_in = [target for target in experts if target.row_axes == (1,)]
    for down in (target for target in experts if target.row_axes == (2,)):
        inputs, count = down.matrix_shape[0], len(down.parts)
        bank = down.path.rpartition("/")[0]
        for up in (target for target in ways_in if target.path.rpartition("/")[0] == bank):
            outputs = up.matrix_shape[1] // count
            if outputs in (inputs, 2 * inputs):  # Behind the gates, where one product makes both.
                yield [
                    Pair(one, (other,), np.arange(inputs), outputs - inputs)
                    for one, other in zip(up.parts, down.parts, strict=True)
                ]


def _product_pair(first: Target, second: Target) -> Pair | None:
    """Returns two products as a pair if their shapes allow it."""
    outputs, inputs = first.matrix_shape[1], second.matrix_shape[0]
    if outputs == inputs:
        return Pair(first, (second,), np.arange(inputs))
    heads = [int(first.variable.shape[axis]) for axis in first.output_axes]
    if len(heads) != 2 or inputs % outputs:
        return None
    # Neighbouring query heads share a head of keys and values.
    features = np.arange(outputs).reshape(heads)
    return Pair(first, (second,), np.repeat(features, inputs // outputs, axis=0).reshape(-1))
