"""Named recipes: settings to begin with, for a wish. Measure what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfgptopt.distillation.losses import LogitsKL
from tfgptopt.distillation.technique import Distill
from tfgptopt.pruning import PolynomialDecay
from tfgptopt.pruning.technique import Prune
from tfgptopt.quantization.rotation import Rotate
from tfgptopt.quantization.specs import Int4, Int8
from tfgptopt.quantization.technique import QuantizeAware
from tfgptopt.recipe.recipe import Recipe
from tfgptopt.shrinking.technique import Shrink

# Of the steps, when pruning ends, and how often it prunes until then.
_END, _TIMES = 0.6, 15


def int8() -> Recipe:
    """Returns a recipe for a quarter of the size.

    Features are turned, so that none stands out, then trained with int8 weights and activations.

    Example:

    ```python
    tfgptopt.recipes.int8().save("recipe.yaml")
    ```
    """
    return Recipe((Rotate(), QuantizeAware(Int8())))


def int4(block_size: int | None = 32) -> Recipe:
    """Returns a recipe for an eighth of the size.

    Features are turned, weights are rounded by GPTQ, and the rounded model learns to predict what
    the float model predicts, its scales along with it. A peak of the learning rate of 5e-5 was good
    for SmolLM2 (`docs/quantization.md`).

    Args:
        block_size: int. As of `Int4`. Defaults to `32`. `None` is smaller and decodes faster, and
            needs more training.

    Example:

    ```python
    tfgptopt.recipes.int4(block_size=64).save("recipe.yaml")
    ```
    """
    taught = Distill(steps=0, losses=(LogitsKL(),))
    spec = Int4(block_size=block_size, scale="learned")
    rounded = QuantizeAware(spec, method="gptq")
    return Recipe((Rotate(), taught, rounded))


def pruned_int8(sparsity: float = 0.5, steps: int = 500) -> Recipe:
    """Returns a recipe for int8 weights of which a part is zero: a smaller download.

    Args:
        sparsity: float in (0, 1). Share of the weights of kernels. Defaults to `0.5`.
        steps: int. How many steps will be trained: pruning ends at 60 % of them. Defaults to `500`.

    Raises:
        ValueError: If one is out of range.

    Example:

    ```python
    tfgptopt.recipes.pruned_int8(0.6, steps=1000).save("recipe.yaml")
    ```
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be an int >= 1. Received: {steps!r}")
    end = max(1, round(steps * _END))
    schedule = PolynomialDecay(0.0, sparsity, 0, end, frequency=max(1, end // _TIMES))
    return Recipe((Prune(schedule), QuantizeAware(Int8())))


def small(parameters: float = 0.5, steps: int = 500) -> Recipe:
    """Returns a recipe for a smaller model in int8, which learns from the large one.

    Args:
        parameters: float in (0, 1). Share of the weights to keep; the shape is searched. Defaults
            to `0.5`.
        steps: int. Steps in which the small model learns before it is rounded. Defaults to `500`.

    Raises:
        ValueError: If one is out of range.

    Example:

    ```python
    tfgptopt.recipes.small(parameters=0.7).save("recipe.yaml")
    ```
    """
    return Recipe((Shrink(parameters=parameters), Distill(steps), QuantizeAware(Int8())))


_NAMED: dict[str, Callable[..., Recipe]] = {
    "int8": int8,
    "int4": int4,
    "pruned_int8": pruned_int8,
    "small": small,
}


def names() -> list[str]:
    """Returns the names of the recipes."""
    return list(_NAMED)


def named(name: str, steps: int) -> Recipe:
    """Returns a recipe by its name.

    Args:
        name: One of `names()`.
        steps: How many steps will be trained.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in _NAMED:
        raise ValueError(f"A recipe is named {', '.join(_NAMED)}. Received: {name!r}")
    settings: dict[str, Any] = {"steps": steps} if name in ("pruned_int8", "small") else {}
    return _NAMED[name](**settings)
