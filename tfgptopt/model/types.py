"""What Keras and TensorFlow have no types for."""

from __future__ import annotations

from typing import Any

# Plain data: what YAML and JSON hold.
Config = dict[str, Any]
# What `fit` takes: a `tf.data.Dataset`, arrays, or batches of them.
Data = Any
