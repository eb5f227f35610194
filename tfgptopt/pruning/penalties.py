"""Penalties on weights that make them small, so that a threshold can prune them.

They are Keras' own regularizers, put on the targets of a model, so that Keras adds them to the loss
inside the compiled step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.model.changing import changing, strategy_scope
from tfgptopt.model.current import full_precision
from tfgptopt.model.targets import Target
from tfgptopt.model.types import Config
from tfgptopt.pruning.blocks import Block, Columns, Rows
from tfgptopt.pruning.nm import NM
from tfgptopt.pruning.patterns import Pattern, deserialize_pattern, serialize_pattern

# A weight, or what goes together, counts as near zero below this share of the root mean square.
NEAR = 0.1


@keras.saving.register_keras_serializable("tfgptopt")
class GroupLasso(keras.regularizers.Regularizer):
    """Drives weights towards zero that a pattern drops together.

    For `Block`, `Rows` and `Columns`: the sum over groups of `sqrt(size) * norm(group)`, which
    leaves some groups alone and makes others vanish as a whole. For `NM(n, m)`: the sum of
    magnitudes of all that is not among the `n` largest of its group, which leaves alone what n:m
    will keep.

    Args:
        strength: float > 0. Factor of the sum.
        pattern: `NM`, `Block`, `Rows` or `Columns`. Single weights have `keras.regularizers.L1`.

    Raises:
        ValueError: If a setting is out of range.

    Example:

    ```python
    from tfgptopt.pruning import Rows

    penalty = GroupLasso(1e-4, Rows())
    print(penalty(numpy.eye(4, dtype="float32")))
    ```

    Reference: Yuan and Lin, 2006, "Model Selection and Estimation in Regression with Grouped
    Variables"; Wen et al., 2016, "Learning Structured Sparsity in Deep Neural Networks"
    (https://arxiv.org/abs/1608.03665).
    """

    def __init__(self, strength: float, pattern: Pattern) -> None:
        if isinstance(strength, bool) or not isinstance(strength, int | float) or strength <= 0:
            raise ValueError(f"`strength` must be a number > 0. Received: {strength!r}")
        if not isinstance(pattern, NM | Block | Rows | Columns):
            raise ValueError(
                "`pattern` must be NM(n, m), Block(rows, columns), Rows() or Columns(); for single "
                f"weights use keras.regularizers.L1(strength). Received: {pattern!r}"
            )
        self.strength, self.pattern = float(strength), pattern

    def __call__(self, x: Any) -> tf.Tensor:
        """Returns the penalty of a matrix `(inputs, outputs)`."""
        x = tf.convert_to_tensor(x)
        if isinstance(self.pattern, NM):
            dropped = self.pattern.outranked(tf.abs(x))
            return self.strength * tf.reduce_sum(tf.where(dropped, tf.abs(x), 0.0))
        return self.strength * tf.reduce_sum(self._sizes(x) * self._norms(x))

    def _norms(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the root mean square of each group."""
        together: Any = self.pattern
        rows, columns = together.size_in(x.shape)
        return Block(rows, columns, "l2").units(x) if rows * columns > 1 else tf.abs(x)

    def _sizes(self, x: tf.Tensor) -> tf.Tensor:
        """Returns how many weights each group has."""
        together: Any = self.pattern
        rows, columns = together.size_in(x.shape)
        down, across = (
            tf.minimum(size, length - tf.range(0, length, size))
            for size, length in zip((rows, columns), x.shape, strict=True)
        )
        return tf.cast(down[:, tf.newaxis] * across, x.dtype)

    def near_zero(self, x: tf.Tensor) -> tf.Tensor:
        """Returns which weights count as near zero: of n:m, what it would drop; else groups."""
        if isinstance(self.pattern, NM):
            return _small(tf.abs(x), x)
        return _small(self._norms(x), x)

    def get_config(self) -> Config:
        """Returns the settings as plain data."""
        return {"strength": self.strength, "pattern": serialize_pattern(self.pattern)}

    @classmethod
    def from_config(cls, config: Config) -> GroupLasso:
        """Returns the penalty that `get_config` wrote."""
        return cls(config["strength"], deserialize_pattern(config["pattern"]))


def _small(magnitudes: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    return magnitudes < NEAR * tf.sqrt(tf.reduce_mean(tf.square(x)))


# Names in recipes.
_CLASSES: dict[str, Any] = {
    "l1": keras.regularizers.L1,
    "l2": keras.regularizers.L2,
    "l1l2": keras.regularizers.L1L2,
    "group_lasso": GroupLasso,
}


def serialize_penalty(penalty: keras.regularizers.Regularizer) -> Config:
    """Returns a penalty as plain data.

    Raises:
        ValueError: If recipes have no name for it.
    """
    for name, penalty_class in _CLASSES.items():
        if type(penalty) is penalty_class:
            return {"name": name, **penalty.get_config()}
    raise ValueError(f"Recipes know {', '.join(_CLASSES)}. Received: {penalty!r}")


def deserialize_penalty(config: Config) -> keras.regularizers.Regularizer:
    """Returns the penalty that `serialize_penalty` wrote.

    Raises:
        ValueError: If the name or a setting is not known or out of range.
    """
    config = dict(config)
    name = config.pop("name", None)
    if name not in _CLASSES:
        raise ValueError(f"A penalty is one of {', '.join(_CLASSES)}. Received: {name!r}")
    try:
        return _CLASSES[name].from_config(config)
    except (TypeError, KeyError) as error:
        raise ValueError(f"Wrong settings for {name}: {sorted(config)} ({error})") from None


class Penalty:
    """The regularizer of one variable while a model is penalized, which can be switched off.

    Args:
        target: The weight. The penalty is put on its variable.
        penalty: What a matrix costs.
        switch: A variable, 1 or 0.
        owner: Who put it there.
    """

    def __init__(
        self, target: Target, penalty: Callable[[Any], Any], switch: tf.Variable, owner: object
    ) -> None:
        self.target, self.penalty, self._switch, self.owner = target, penalty, switch, owner
        # A regularizer that the layer already had goes on.
        self.inner = target.variable.regularizer
        target.variable.regularizer = self

    def __call__(self, x: Any) -> tf.Tensor:
        matrix = self.target.to_matrix(full_precision(self.target.variable))
        mine = tf.cast(self._switch, tf.float32) * self.penalty(matrix)
        return mine if self.inner is None else mine + tf.cast(self.inner(x), tf.float32)

    def take_off(self) -> None:
        """Gives the variable back its own regularizer."""
        self.target.variable.regularizer = self.inner


def penalized(variable: keras.Variable) -> bool:
    """Returns whether a penalty lies on a variable."""
    return isinstance(variable.regularizer, Penalty)


class Penalizer:
    """Puts a penalty on weights of a model, switches it, and tells what it brings.

    Args:
        model: A built model.
        chosen: Its weights.
        penalty: What a matrix costs.
    """

    def __init__(self, model: keras.Model, chosen: list[Target], penalty: Any) -> None:
        self.model, self.targets, self.penalty = model, chosen, penalty
        with strategy_scope(model):
            self._switch = tf.Variable(0.0, trainable=False)
        self._measure = tf.function(self._measured, autograph=False)

    @classmethod
    def on(cls, model: keras.Model, chosen: list[Target], penalty: Any) -> Penalizer:
        """Returns what puts a penalty on weights: what has put the same there, or a new one."""
        owners = [getattr(t.variable.regularizer, "owner", None) for t in chosen]
        known = owners[0]
        if isinstance(known, Penalizer) and known.model is model and known.is_on_model:
            same = len(known.targets) == len(chosen) and all(one is known for one in owners)
            if same and _equal(known.penalty, penalty):
                return known
        return cls(model, chosen, penalty)

    def attach(self) -> None:
        """Puts the penalty on the weights, once: the step is traced again then."""
        if not self.is_on_model:
            with changing(self.model):
                for target in self.targets:
                    if penalized(target.variable):  # Of an earlier `fit`.
                        target.variable.regularizer.take_off()
                    Penalty(target, self.penalty, self._switch, self)

    def switch(self, on: bool) -> None:
        """Lets the penalty count in the loss, or not, without a new trace."""
        self._switch.assign(float(on))

    @property
    def is_on_model(self) -> bool:
        """Whether the weights still have this penalty."""
        found = [getattr(t.variable.regularizer, "owner", None) for t in self.targets]
        return all(owner is self for owner in found)

    def _measured(self) -> tuple[tf.Tensor, tf.Tensor]:
        near_zero = getattr(self.penalty, "near_zero", lambda x: _small(tf.abs(x), x))
        cost, small, total = tf.zeros(()), tf.zeros(()), 0
        for target in self.targets:
            matrix = target.to_matrix(full_precision(target.variable))
            cost += self.penalty(matrix)
            share = tf.reduce_mean(tf.cast(near_zero(matrix), tf.float32))
            small += share * target.size
            total += target.size
        return cost, small / total

    def measure(self) -> tuple[float, float]:
        """Returns what the weights cost, and the share of them that is near zero."""
        cost, small = self._measure()
        return float(cost), float(small)


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    known = type(one) is type(other) and hasattr(one, "get_config")
    return known and one.get_config() == other.get_config()


def remove_penalties(variables: Iterable[keras.Variable]) -> None:
    """Takes penalties off variables that have one."""
    for variable in variables:
        variable.regularizer.take_off()
