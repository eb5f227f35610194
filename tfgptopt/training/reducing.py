"""Adds gradients up over replicas before an optimizer reads them, and can keep them back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

# Set while a step gathers gradients in the place of applying them.
_GATHERED = "_tfgptopt_gathered"
# On an optimizer that adds gradients up first, and what looks at its gradients.
_REDUCES, _LOOK = "_tfgptopt_reduces", "_tfgptopt_look"


def replica_count() -> int:
    """Returns over how many replicas the step that is being traced runs."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def over_replicas(values: Any) -> Any:
    """Returns sums over all replicas of the strategy. Call it in a replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def inner_optimizers(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """Returns what updates variables: an optimizer itself, or those that it wraps."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return list(getattr(inner, "optimizers", [inner]))


def reduce_first(optimizer: keras.optimizers.Optimizer) -> None:
    """Lets an optimizer add gradients up over replicas before it clips and checks them.

    Keras clips the gradients of each replica for itself, and looks for overflow in one replica
    alone: two replicas would then train otherwise than one with the same batch.
    """
    if _REDUCES in vars(optimizer):
        return
    plain = functools.partial(type(optimizer).apply, optimizer)

    def apply(grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        variables = list(trainable_variables or optimizer._trainable_variables)
        gathered = vars(optimizer).get(_GATHERED)
        if gathered is not None:
            gathered.append((list(grads), variables))
            return
        summed = _summed(list(grads))
        look = vars(optimizer).get(_LOOK)
        if look is not None:
            look(summed)
        plain(summed, variables)

    object.__setattr__(optimizer, "apply", apply)
    object.__setattr__(optimizer, _REDUCES, True)
    for each in inner_optimizers(optimizer):
        object.__setattr__(each, "_all_reduce_sum_gradients", lambda pairs: pairs)


def watch_gradients(
    optimizer: keras.optimizers.Optimizer, look: Callable[[list[Any]], None]
) -> None:
    """Shows the gradients of each update to a function, those of all replicas where they are added.

    Args:
        optimizer: The optimizer.
        look: Called with gradients, some of which may be `None`, while a step is traced.
    """
    object.__setattr__(optimizer, _LOOK, look)
    if "apply" in vars(optimizer):  # That of `reduce_first`, which looks for it.
        return
    plain = optimizer.apply

    def apply(grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        look(list(grads))
        plain(grads, trainable_variables)

    object.__setattr__(optimizer, "apply", apply)


def _summed(grads: list[Any]) -> list[Any]:
    present = [gradient for gradient in grads if gradient is not None]
    if not present:
        return grads
    sums = iter(over_replicas(present))
    return [None if gradient is None else next(sums) for gradient in grads]


@contextlib.contextmanager
def gathering(optimizer: keras.optimizers.Optimizer) -> Iterator[list[Any]]:
    """Gives the `(gradients, variables)` that are applied inside, and does not apply them."""
    gathered: list[Any] = []
    object.__setattr__(optimizer, _GATHERED, gathered)
    try:
        yield gathered
    finally:
        object.__delattr__(optimizer, _GATHERED)
