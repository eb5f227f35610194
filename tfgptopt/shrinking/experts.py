"""Leaves out the experts of a mixture that tokens are routed to least."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.families.mixtures import Experts, experts_of
from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.cloning import backbone_config, with_backbone
from tfgptopt.model.overriding import overriding
from tfgptopt.model.types import Data
from tfgptopt.shrinking.importance import read_data
from tfgptopt.shrinking.shapes import absolute
from tfgptopt.terminal.progress import track


def experts_to_keep(model: keras.Model, wanted: Any) -> int:
    """Returns how many experts of each layer stay.

    Args:
        model: A mixture of KerasHub.
        wanted: int, or float as a share.

    Raises:
        ValueError: If the model is no mixture, the number is out of range, or fewer would stay
            than compute each token.
    """
    backbone = getattr(model, "backbone", model)
    found = experts_of(backbone)
    if not found:
        raise ValueError(f"{type(model).__name__} is no mixture: it has no experts to leave out.")
    kept = absolute("experts", wanted, backbone.num_experts)
    if kept < found[0].top_k:
        raise ValueError(
            f"{found[0].top_k} experts compute each token, so that as many have to stay. Received: "
            f"experts={wanted!r}, which are {kept} of {backbone.num_experts}"
        )
    return kept


def make_with_experts(model: keras.Model, kept: int) -> Any:
    """Returns a mixture with fewer experts and random weights."""
    backbone = getattr(model, "backbone", model)
    with strategy_scope(model):
        small = type(backbone).from_config({**backbone_config(backbone), "num_experts": kept})
        return with_backbone(model, small, getattr(model, "preprocessor", None))


def fill_experts(model: keras.Model, small: keras.Model, calibration: Data) -> None:
    """Copies a mixture into one with fewer experts: those that are routed to most.

    Each layer has its own. Routers that do not train cannot learn that experts are gone, and are
    warned of.
    """
    old, new = getattr(model, "backbone", model), getattr(small, "backbone", small)
    routing = routed(model, calibration)
    axes: dict[int, tuple[int, np.ndarray]] = {}
    for experts, share in zip(experts_of(new), routing, strict=True):
        best = np.sort(np.argsort(-share, kind="stable")[: new.num_experts])
        axes |= {id(variable): (-1, best) for variable in experts.router.variables}
        axes |= {id(variable): (0, best) for variable in experts.bank.variables}
    if any(not experts.router.trainable for experts in experts_of(old)):
        warnings.warn(
            "Routers of this mixture are frozen: they cannot learn in training that experts are "
            "gone. Set `trainable = True` on them before you train.",
            stacklevel=2,
        )
    for source, variable in zip(old.variables, new.variables, strict=True):
        value = keras.ops.convert_to_numpy(source)
        if id(variable) in axes:
            axis, best = axes[id(variable)]
            value = np.take(value, best, axis)
        variable.assign(value)


def routed(model: keras.Model, calibration: Data) -> list[np.ndarray]:
    """Returns which share of the tokens' weight goes to each expert, for each layer with experts.

    A token counts for the experts that compute it, with their probabilities; padding does not.

    Args:
        model: A mixture of KerasHub.
        calibration: Text, or batches as `fit` reads them.

    Returns:
        List of float64 arrays `(experts,)`, each with a sum of 1.

    Raises:
        ValueError: If calibration data is missing or empty.

    Reference: Muzio et al., 2024, "SEER-MoE: Sparse Expert Efficiency through Regularization for
    Mixture-of-Experts" (https://arxiv.org/abs/2404.05089).
    """
    backbone = getattr(model, "backbone", model)
    batches = read_data(model, calibration)
    found = experts_of(backbone)
    sums = [np.zeros(backbone.num_experts) for _ in found]
    for batch in track(batches, "Looking at routers"):
        real = tf.reshape(batch["padding_mask"] != 0, (-1,))
        with tokens_as_input(model), _watching(found, real, sums):
            backbone(batch, training=False)
    return [total / total.sum() for total in sums]


@contextmanager
def _watching(found: list[Experts], real: tf.Tensor, sums: list[np.ndarray]) -> Iterator[None]:
    """Adds up what routers say of real tokens while the model runs."""

    def wrap(experts: Experts, total: np.ndarray) -> Any:
        call = experts.router.call

        def watched(*args: object, **kwargs: object) -> Any:
            logits = call(*args, **kwargs)
            rows = tf.reshape(tf.cast(logits, tf.float32), (-1, total.size))
            chances = tf.nn.softmax(tf.boolean_mask(rows, real))
            values, chosen = tf.math.top_k(chances, experts.top_k)
            np.add.at(total, chosen.numpy().ravel(), values.numpy().ravel())
            return logits

        return watched

    pairs = zip(found, sums, strict=True)
    with overriding([(one.router, "call", wrap(one, total)) for one, total in pairs]):
        yield
