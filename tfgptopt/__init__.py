"""Makes GPTs written in Keras 3 small and fast while they train, and ships what was trained.

Names are imported when they are first used: the runtime of an exported file needs neither
TensorFlow nor Keras.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from tfgptopt.backend import advice

if TYPE_CHECKING:
    from tfgptopt.distillation import Distiller as Distiller
    from tfgptopt.evaluation import evaluate as evaluate
    from tfgptopt.exporting import export as export
    from tfgptopt.generation import TFLiteCausalLM as TFLiteCausalLM
    from tfgptopt.pruning.one_shot import prune as prune
    from tfgptopt.quantization.aware import quantize_aware as quantize_aware
    from tfgptopt.quantization.post_training import quantize as quantize
    from tfgptopt.recipe import Recipe as Recipe
    from tfgptopt.recipe import recipes as recipes
    from tfgptopt.recipe.finalizing import finalize as finalize
    from tfgptopt.recipe.summarizing import summary as summary
    from tfgptopt.shrinking import shrink as shrink

__version__ = "0.2.0"

_PUBLIC = {
    "Distiller": "tfgptopt.distillation",
    "Recipe": "tfgptopt.recipe",
    "TFLiteCausalLM": "tfgptopt.generation",
    "evaluate": "tfgptopt.evaluation",
    "export": "tfgptopt.exporting",
    "finalize": "tfgptopt.recipe.finalizing",
    "prune": "tfgptopt.pruning.one_shot",
    "quantize": "tfgptopt.quantization.post_training",
    "quantize_aware": "tfgptopt.quantization.aware",
    "recipes": "tfgptopt.recipe",
    "shrink": "tfgptopt.shrinking",
    "summary": "tfgptopt.recipe.summarizing",
}

__all__ = ["__version__", *_PUBLIC]

# A warning, not an error: the runtime of an exported file works with any backend, or none.
if _problem := advice():
    warnings.warn(_problem, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tfgptopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
