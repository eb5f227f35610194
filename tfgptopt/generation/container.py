"""What a tfgptopt file says of itself: the metadata inside the `.tflite`."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema

METADATA_NAME = "tfgptopt"
FORMAT_VERSION = 1


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads the metadata of a file, and checks that the file is whole.

    Args:
        path: A `.tflite` file written by `tfgptopt.export`.

    Returns:
        The metadata as plain data; `docs/tflite_format.md` lists its fields.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no TFLite file, was cut off, or was not written by tfgptopt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    with path.open("rb") as file:
        if file.read(8)[4:] != b"TFL3":
            raise ValueError(f"'{path}' is not a TFLite file: it does not begin with TFL3.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                blob = _find(data)
            except Exception as error:
                raise ValueError(f"'{path}' is damaged or was cut off ({error!r}).") from None
    if blob is None:
        raise ValueError(
            f"'{path}' is a TFLite file, but was not written by tfgptopt: it has no metadata named "
            f"'{METADATA_NAME}'. Write it with `tfgptopt.export(model, path)`."
        )
    metadata: dict[str, Any] = json.loads(blob)
    if metadata["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format {metadata['format_version']}; this tfgptopt reads up to "
            f"{FORMAT_VERSION}. Update tfgptopt."
        )
    return metadata


def _find(data: Any) -> bytes | None:
    """Returns our metadata, after touching the ends of every buffer of the file."""
    model = schema.Model.GetRootAs(data, 0)
    for i in range(model.BuffersLength()):
        buffer = model.Buffers(i)
        if buffer.DataLength():
            buffer.Data(buffer.DataLength() - 1)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == METADATA_NAME.encode():
            return model.Buffers(entry.Buffer()).DataAsNumpy().tobytes()
    return None
