"""Which tokens the experts of a mixture read, as its routers choose while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfgptopt.families.mixtures import Experts, experts_of
from tfgptopt.model.targets import Target

_NAMED = 3


class Routing:
    """Tells the rows of each expert apart, by what the routers said last.

    Args:
        model: A built Keras 3 model.
        chosen: Kernels of it.

    Raises:
        ValueError: If it is not known which router chooses the experts of a kernel.
    """

    def __init__(self, model: keras.Layer, chosen: list[Target]) -> None:
        experts = [target for target in chosen if target.expert_axis is not None]
        known = _by_product(model) if experts else {}
        for target in experts:
            if id(target.layer) not in known:
                raise ValueError(
                    f"{target.path} has the matrices of experts, and no router of a known family "
                    "chooses them: calibration cannot tell what each reads. Leave it out with "
                    "`targets`, or use `Magnitude()`."
                )
        self._experts = {id(target.layer): known[id(target.layer)] for target in experts}
        self._picked: dict[int, tf.Tensor] = {}
        self._last: list[Any] = [None, None]

    @property
    def routers(self) -> dict[int, keras.layers.Dense]:
        """The routers that have to be listened to, by their ids."""
        return {id(one.router): one.router for one in self._experts.values()}

    def listening(
        self, router: keras.Layer, call: Callable[..., Any], real: tf.Tensor | None
    ) -> Callable[..., Any]:
        """Returns the call of a router that also notes which experts it chooses.

        Args:
            router: The router.
            call: Its call.
            real: bool tensor, which tokens are no padding; `None` if all are.
        """
        top_k = next(one.top_k for one in self._experts.values() if one.router is router)

        def heard(*args: object, **kwargs: object) -> Any:
            logits = call(*args, **kwargs)
            count = logits.shape[-1]
            _, best = tf.math.top_k(tf.reshape(tf.cast(logits, tf.float32), (-1, count)), top_k)
            picked = tf.reduce_any(tf.one_hot(best, count, True, False, dtype=tf.bool), 1)
            if real is not None and real.shape[0] == picked.shape[0]:
                picked = tf.logical_and(picked, real[:, tf.newaxis])
            self._picked[id(router)] = picked
            return logits

        return heard

    def rows(self, target: Target, inputs: tf.Tensor) -> list[tuple[Target, tf.Tensor]]:
        """Returns each expert that got tokens of what its product reads, with its rows.

        Args:
            target: The kernel of all experts.
            inputs: `(tokens, inputs)`, or `(experts, tokens, inputs)`.
        """
        picked = self._picked[id(self._experts[id(target.layer)].router)]
        if inputs is not self._last[0]:
            by_expert = [inputs] * picked.shape[1] if len(inputs.shape) == 2 else list(inputs)
            found = [
                tf.cast(tf.boolean_mask(each, picked[:, i]), tf.float32)
                for i, each in enumerate(by_expert)
            ]
            self._last[:] = inputs, found
        pairs = zip(target.parts, self._last[1], strict=True)
        return [(part, rows) for part, rows in pairs if rows.shape[0]]


def has_router(model: keras.Layer, chosen: list[Target]) -> list[bool]:
    """Returns of each target whether data tells what it reads: for experts, a router must say."""
    known = _by_product(model) if any(t.expert_axis is not None for t in chosen) else {}
    return [t.expert_axis is None or id(t.layer) in known for t in chosen]


def _by_product(model: keras.Layer) -> dict[int, Experts]:
    return {
        id(product): one
        for one in experts_of(model)
        for product in getattr(one.bank, "expert_products", ())
    }


def warn_of_unread(unread: list[Target], instead: str, stacklevel: int) -> None:
    """Warns of experts that got no token of the calibration data.

    Args:
        unread: The matrices of these experts.
        instead: What was done with them, such as `"rounded to nearest"`.
        stacklevel: As of `warnings.warn`.
    """
    if not unread:
        return
    named = ", ".join(f"expert {part.expert} of {part.path}" for part in unread[:_NAMED])
    more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
    warnings.warn(
        f"No token of the calibration data was routed to {named}{more}: {instead} without data. "
        "More text may reach them.",
        stacklevel=stacklevel + 1,
    )
