"""A file that exists: no model has to be trained to read one."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def path() -> Path:
    """Written when format 5 was new: a GPT-2 of one layer, int8, with a tokenizer and a recipe."""
    return Path(__file__).parent / "data" / "format5.tflite"
