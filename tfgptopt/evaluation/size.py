"""How large a model is: parameters, zeros, bytes on disk and in a download."""

from __future__ import annotations

import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from tfgptopt.file.container import read_metadata


@dataclass(frozen=True)
class Size:
    """What a model takes.

    Attributes:
        parameters: Number of weights; `None` where the artifact does not tell.
        nonzero_share: Share of them that are not zero, or `None`.
        file_bytes: Bytes on disk.
        gzip_bytes: Bytes under gzip, as a download has them.
    """

    parameters: int | None
    nonzero_share: float | None
    file_bytes: int
    gzip_bytes: int


class _Counter:
    """A file object that counts bytes and keeps none."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: bytes) -> int:
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        """Does nothing; gzip calls it."""


def gzip_size(path: Path) -> int:
    """Returns the size of a file under gzip, without keeping it in memory."""
    counter = _Counter()
    with path.open("rb") as source, gzip.GzipFile(fileobj=counter, mode="wb") as packed:  # type: ignore[call-overload]
        while piece := source.read(1 << 20):
            packed.write(piece)
    return counter.count


def keras_size(model: keras.Model) -> Size:
    """Returns the size of a Keras model, its weights saved as `.weights.h5`."""
    # A task that was compiled would save its optimizer too; its backbone has all the weights.
    model = getattr(model, "backbone", model)
    arrays = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
    total = sum(array.size for array in arrays)
    nonzero = sum(int(np.count_nonzero(array)) for array in arrays)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.weights.h5"
        model.save_weights(path)
        return Size(total, nonzero / total, path.stat().st_size, gzip_size(path))


def tflite_size(path: Path) -> Size:
    """Returns the size of an exported file."""
    weights = read_metadata(path).weights
    return Size(
        parameters=weights.parameters,
        nonzero_share=weights.nonzero / weights.parameters,
        file_bytes=path.stat().st_size,
        gzip_bytes=gzip_size(path),
    )
