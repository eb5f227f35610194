"""Makes sure that Keras runs on TensorFlow. Imports neither."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def configured_backend() -> str:
    """Returns the backend that Keras has, or will have once it is imported."""
    keras = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "backend"):
        return str(keras.backend.backend())
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        return str(json.loads((home / "keras.json").read_text("utf-8"))["backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow"


def advice() -> str | None:
    """Returns what to do about another backend than TensorFlow, or `None` if all is well."""
    backend = configured_backend()
    if backend == "tensorflow":
        return None
    return (
        f"tfgptopt needs Keras to run on TensorFlow, and its backend is '{backend}'. Set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is imported, or change "
        '"backend" in ~/.keras/keras.json, and start Python again.'
    )


def require_tensorflow() -> None:
    """Raises unless Keras runs on TensorFlow.

    Raises:
        ImportError: If it has another backend.
    """
    problem = advice()
    if problem:
        raise ImportError(problem)
