"""How much each weight is pruned, where not all are pruned alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.calibration.blocks import targets_by_block
from tfgptopt.calibration.statistics import SquaredSums, by_weight
from tfgptopt.calibration.watching import observe_all
from tfgptopt.model.targets import Selector, Target, select
from tfgptopt.model.types import Data


@dataclass(frozen=True)
class Allocation:
    """A sparsity for each weight. While a schedule rises, all rise in proportion.

    When the schedule stands at the mean of the allocation (counted in weights), each weight has
    its own sparsity.

    Args:
        sparsities: Sparsity in `[0, 1)` by the path of each weight.

    Raises:
        ValueError: If it is empty, or a sparsity is out of range.
    """

    sparsities: Mapping[str, float]

    def __post_init__(self) -> None:
        values = {str(path): float(share) for path, share in dict(self.sparsities).items()}
        wrong = {path: share for path, share in values.items() if not 0.0 <= share < 1.0}
        if wrong or not any(values.values()):
            raise ValueError(
                "An allocation gives sparsities in [0, 1), not all of them 0. "
                f"Received: {wrong or values}"
            )
        object.__setattr__(self, "sparsities", values)

    def check(self, chosen: list[Target]) -> None:
        """Raises unless the allocation has a sparsity for every target."""
        missing = [t.path for t in chosen if t.path not in self.sparsities]
        if missing:
            raise ValueError(
                f"The allocation has no sparsity for {missing[0]} ({len(missing)} missing). "
                "Allocate over the same `targets` that are pruned."
            )
        paths = [target.path for target in chosen]
        twice = [path for path in paths if paths.count(path) > 1]
        if twice:
            raise ValueError(f"Two weights are called {twice[0]}: give their layers other names.")
        if not any(self.sparsities[path] for path in paths):
            raise ValueError("The allocation gives sparsity 0 to all of the `targets`.")

    def at(self, sparsity: float, chosen: list[Target]) -> list[float]:
        """Returns the sparsity of each target when the schedule stands at `sparsity`.

        Raises:
            ValueError: If a weight would lose all its values.
        """
        own = np.array([self.sparsities[target.path] for target in chosen])
        mean = float(np.average(own, weights=[target.size for target in chosen]))
        scaled = own * (sparsity / mean)
        if scaled.max() >= 1.0:
            raise ValueError(
                f"At sparsity {sparsity:.3g} the allocation gives {scaled.max():.3g} to "
                f"{chosen[int(scaled.argmax())].path}. Its mean is {mean:.3g}: end the schedule "
                "there, or allocate anew."
            )
        return [float(share) for share in scaled]


def owl(
    model: keras.Layer,
    data: Data,
    sparsity: float,
    targets: Selector | None = None,
    threshold: float = 5.0,
    spread: float = 0.08,
) -> Allocation:
    """Prunes blocks with many outliers less than the others.

    The outliers of a block are its weights with `|W| * ||X||` above `threshold` times the mean.

    Args:
        model: A built Keras 3 model. It is not changed.
        data: Calibration data: a finite `tf.data.Dataset` or arrays.
        sparsity: float in `(0, 1)`, the mean over all weights.
        targets: Selector of the weights. Defaults to `None`: all kernels.
        threshold: float, how many times the mean an outlier is. Defaults to `5.0`.
        spread: float, how far a block may lie from the mean. Defaults to `0.08`.

    Returns:
        `Allocation`, with one sparsity for all weights of a block.

    Raises:
        ValueError: If the data is empty or does not fit, or a sparsity would be out of range.

    Example:

    ```python
    allocation = tfgptopt.pruning.owl(gpt, windows.take(16), sparsity=0.6)
    tfgptopt.prune(gpt, 0.6, score=Wanda(windows.take(16)), allocation=allocation)
    ```

    Reference: Yin et al., 2023, "Outlier Weighed Layerwise Sparsity (OWL)"
    (https://arxiv.org/abs/2310.05175).
    """
    if not 0.0 < sparsity - spread < sparsity + spread < 1.0:
        raise ValueError(
            "`sparsity` plus and minus `spread` must lie between 0 and 1. "
            f"Received: sparsity={sparsity}, spread={spread}"
        )
    chosen = select(model, targets)
    squares = SquaredSums(chosen)
    observe_all(model, chosen, data, squares)
    blocks = targets_by_block(model, chosen)
    sizes = np.array([sum(target.size for target in block) for block in blocks])
    outliers = np.array([_outlier_share(block, squares, threshold) for block in blocks])
    width = float(np.ptp(outliers))
    kept = (outliers - outliers.min()) / width * 2 * spread if width else np.zeros(len(blocks))
    shares = sparsity - (kept - np.average(kept, weights=sizes))
    return Allocation(
        {t.path: float(share) for block, share in zip(blocks, shares, strict=True) for t in block}
    )


def _outlier_share(block: list[Target], squares: SquaredSums, threshold: float) -> float:
    scores = []
    for target in block:
        weights = tf.cast(target.to_matrix(tf.convert_to_tensor(target.variable.value)), tf.float32)
        scored = tf.abs(weights) * by_weight(squares.norms(target), target)
        scores.append(tf.reshape(scored, (-1,)))
    together = tf.concat(scores, axis=0)
    outliers = together > threshold * tf.reduce_mean(together)
    return float(tf.reduce_mean(tf.cast(outliers, tf.float32)))
