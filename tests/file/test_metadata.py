"""What a file says of itself: both ends, files of the format's first readers, and damage."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tfgptopt.file import metadata
from tfgptopt.file.container import read_metadata
from tfgptopt.generation import TFLiteCausalLM

FORMAT_5 = Path(__file__).parent / "data" / "format5.tflite"
IDS = [1, 2, 3, 19, 0, 9, 0, 8, 20, 22, 8, 22, 0, 21, 0, 21]


def test_a_file_of_format_5_gives_the_tokens_that_it_gave():
    lm = TFLiteCausalLM(FORMAT_5)
    assert lm.generate([1, 2, 3], max_length=16, stop=None) == IDS
    assert lm.generate("the cat sat on", max_length=16, stop=None) == "the cat sat onj"
    assert lm.metadata.format_version == 5
    assert lm.metadata.decoder == metadata.DecoderShape(1, 2, 2, 8, "float32", True, 32, 32)
    assert lm.metadata.recipe["techniques"][0]["name"] == "quantize_aware"
    assert lm.metadata.generation == metadata.GenerationDefaults(0, (0,), 0)


def test_what_is_written_is_what_was_read():
    found = read_metadata(FORMAT_5)
    assert metadata.Metadata.from_entries(found.entries()) == found
    data = FORMAT_5.read_bytes()
    assert found.entries()[metadata.METADATA_NAME] in data
    other = dataclasses.replace(found, tokenizer=None, sentencepiece=bytes(range(256)))
    assert metadata.Metadata.from_entries(other.entries()) == other


def entry(data: bytes) -> dict[str, bytes]:
    return {metadata.METADATA_NAME: data}


def changed(path: str, value: object = None, remove: bool = False) -> dict[str, bytes]:
    """Returns metadata with a field that has another value, or none."""
    about = json.loads(read_metadata(FORMAT_5).entries()[metadata.METADATA_NAME])
    *above, name = path.split(".")
    section = about
    for part in above:
        section = section[part]
    if remove:
        del section[name]
    else:
        section[name] = value
    return entry(json.dumps(about).encode())


@pytest.mark.parametrize(
    "path",
    [
        "versions",
        "source.family",
        "decoder.head_dim",
        "decoder.resizable",
        "signatures.score",
        "generation.end_token_ids",
        "recipe",
        "weights.sha256",
        "tokenizer",
    ],
)
def test_a_missing_field_is_named(path):
    with pytest.raises(ValueError, match=f"'a.tflite' is damaged: its metadata lacks {path}"):
        metadata.Metadata.from_entries(changed(path, remove=True), "'a.tflite'")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("decoder.head_dim", "8", "decoder.head_dim in its metadata is '8', and should be of type"),
        ("decoder.num_layers", True, "should be of type int"),
        ("decoder.context_length", 0, "should be at least 1"),
        ("decoder.cache_dtype", "int2", "should be one of"),
        ("decoder", [], "its decoder is no object"),
        ("signatures.decode", {"a": 1, "b": 1}, "should be one signature"),
        ("signatures.prefill", {}, "should be a signature at least"),
        ("generation.end_token_ids", ["x"], "should be a list of token ids"),
        ("format_version", None, "its format version is None"),
        ("format_version", 7, "has format 7; this tfgptopt reads formats 5 to 6. Update tfgptopt"),
        ("format_version", 4, "has format 4; .* Export the model again"),
    ],
)
def test_a_field_that_cannot_be_is_named(path, value, words):
    with pytest.raises(ValueError, match=words):
        metadata.Metadata.from_entries(changed(path, value))


def test_fields_that_are_not_known_are_passed_over():
    found = metadata.Metadata.from_entries(changed("generation.top_k", 5))
    assert found == read_metadata(FORMAT_5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.tokenizer = None


def test_no_json():
    with pytest.raises(ValueError, match="was cut off"):
        metadata.Metadata.from_entries(entry(b"{"))
    with pytest.raises(ValueError, match="is no object"):
        metadata.Metadata.from_entries(entry(b"[]"))


def test_the_room_needs_neither_tensorflow_nor_keras():
    code = (
        "import sys, tfgptopt.file.container, tfgptopt.file.replacing;"
        "assert not {'tensorflow', 'keras', 'keras_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
