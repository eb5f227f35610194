"""Shrinking: a smaller model of the same class, made of the parts that matter."""

from tfgptopt.backend import require_tensorflow

require_tensorflow()

from tfgptopt.shrinking.importance import Importance, importance  # noqa: E402
from tfgptopt.shrinking.shapes import Shape, shape_of  # noqa: E402
from tfgptopt.shrinking.shrinker import shrink  # noqa: E402

__all__ = ["Importance", "Shape", "importance", "shape_of", "shrink"]
