"""Puts masks and scores into the checkpoints that Keras writes, where a plain model ignores them.

Zeros alone tell the masks of most models, but not of one with weights that are zero by chance, and
they tell nothing of gathered scores. `save_weights`, and so `BackupAndRestore` and
`ModelCheckpoint`, ask everything that hangs on a model for its variables; this asks to be asked.
"""

from __future__ import annotations

import weakref
from typing import Any

import keras
import numpy as np

from tfgptopt.model import masks
from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.targets import Target, candidates

# Keras loads what hangs on a model in the order of its names: masks behind all weights.
_ATTRIBUTE = "_zz_tfgptopt_masks"


class MaskState(keras.layers.Layer):
    """The masks of a model, as something that Keras saves and loads.

    Args:
        model: The model that it hangs on.
    """

    def __init__(self, model: keras.Layer) -> None:
        super().__init__(name="pruning_masks")
        self.built = True
        self._model = weakref.ref(model)  # Not a layer inside this one.
        self._loaded: Any = {}
        self._claims: dict[int, Any] = {}

    def new_claims(self) -> None:
        """Forgets who prunes what, before a training begins."""
        self._claims = {}

    def claim(self, chosen: list[Target], claimant: Any) -> None:
        """Notes who is about to prune some weights.

        Raises:
            ValueError: If another prunes one of them.
        """
        for target in chosen:
            if self._claims.setdefault(id(target.variable), claimant) is not claimant:
                raise ValueError(overlap(target))

    def _held(self) -> list[tuple[int, Target]]:
        """Returns the masked weights with their place in the model; names may differ at reload."""
        # Skipped layers count too: a layer may be skipped in one model and not in the other.
        return [
            (i, item)
            for i, item in enumerate(candidates(self._model()))
            if isinstance(item, Target) and masks.masked(item.variable)
        ]

    def save_own_variables(self, store: Any) -> None:
        """Writes masks as bits, scores, and the steps that were seen."""
        for i, target in self._held():
            held = target.variable.constraint
            mask = keras.ops.convert_to_numpy(held.mask.value)
            store[f"mask_{i}"] = np.packbits(mask.reshape(-1))
            if held.owner is None:
                continue
            store[f"seen_{i}"] = np.int64(held.owner.seen)
            index = held.owner.targets_index(target)
            for j, variable in enumerate(held.owner.gathered(index)):
                store[f"score_{i}_{j}"] = keras.ops.convert_to_numpy(variable.value)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote; a checkpoint of a plain model has nothing.

        Its weights are pruned then by the masks that are there, which hold until `finalize`.
        """
        self._loaded = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118
        self.restore()
        with strategy_scope(self._model()):
            masks.apply([target for _, target in self._held()])

    def restore(self) -> None:
        """Gives masked weights what was loaded for them; scores once something measures them."""
        resumed: dict[int, tuple[Any, int]] = {}
        for i, target in self._held():
            bits = self._loaded.get(f"mask_{i}")
            if bits is None or bits.size != -(-target.size // 8):
                continue
            held = target.variable.constraint
            mask = np.unpackbits(bits, count=target.size).astype(bool)
            held.mask.assign(mask.reshape(target.variable.shape))
            if held.owner is None:
                continue
            self._restore_scores(i, target, held.owner)
            del self._loaded[f"mask_{i}"]
            seen = self._loaded.pop(f"seen_{i}", None)
            if seen is not None:
                resumed[id(held.owner)] = (held.owner, int(seen))
        for owner, seen in resumed.values():
            owner.resume(seen)

    def _restore_scores(self, i: int, target: Target, owner: Any) -> None:
        index = owner.targets_index(target)
        for j, variable in enumerate(owner.gathered(index)):
            saved = self._loaded.pop(f"score_{i}_{j}", None)
            if saved is not None and saved.shape == tuple(variable.shape):
                variable.assign(saved)


def overlap(target: Target) -> str:
    """Returns what is wrong where a weight is pruned twice."""
    return f"Two prunings act on {target.path}. Give each its own `targets`, or use one."


def mask_state(model: keras.Layer) -> MaskState:
    """Returns what saves and loads the masks of a model, made on the first call."""
    state = getattr(model, _ATTRIBUTE, None)
    if not isinstance(state, MaskState):
        state = MaskState(model)
        object.__setattr__(model, _ATTRIBUTE, state)
    return state


def forget(model: keras.Layer) -> None:
    """Takes the state off a model without masks."""
    if hasattr(model, _ATTRIBUTE):
        object.__delattr__(model, _ATTRIBUTE)
