"""Files that are damaged, foreign or too new raise, and never reach LiteRT."""

import json

import numpy as np
import pytest
import tokenizers
from ai_edge_litert import schema_py_generated as schema

from tfgptopt.exporting.tflite.builder import Model
from tfgptopt.file.container import read_container, seal
from tfgptopt.file.metadata import FORMAT_VERSION
from tfgptopt.generation import TFLiteCausalLM


def rewritten(data: bytes, change) -> bytes:
    """Returns a file whose metadata were changed, with a right checksum."""
    flat = data[:-16]
    model = schema.ModelT.InitFromPackedBuf(flat, 0)
    (entry,) = [e for e in model.metadata if e.name == b"tfgptopt"]
    metadata = json.loads(bytes(model.buffers[entry.buffer].data))
    change(metadata)
    buffer = model.buffers[entry.buffer]
    buffer.data = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    import flatbuffers

    builder = flatbuffers.Builder(len(flat))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    changed = bytes(builder.Output())
    return changed + seal(changed)


def refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        TFLiteCausalLM(path)


def test_no_file_and_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        TFLiteCausalLM(tmp_path / "nothing.tflite")
    refused(tmp_path / "a.tflite", b"", "not a TFLite file")
    refused(tmp_path / "a.tflite", b"not a model at all", "not a TFLite file")


def test_every_flipped_bit_is_found(path, tmp_path):
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    spots = {0, 4, len(whole) - 1, len(whole) - 8, len(whole) - 16}
    spots |= set(generator.integers(0, len(whole), 250).tolist())
    for spot in spots:
        data = bytearray(whole)
        data[spot] ^= 1 << int(generator.integers(8))
        refused(tmp_path / "a.tflite", bytes(data), "damaged|not a TFLite file")


def test_every_truncation_is_found(path, tmp_path):
    whole = path.read_bytes()
    ends = {1, 7, 8, 9, 20, len(whole) - 16, len(whole) - 15, len(whole) - 1}
    ends |= set(np.random.default_rng(1).integers(0, len(whole), 60).tolist())
    for end in ends:
        refused(tmp_path / "a.tflite", whole[:end], "damaged|not a TFLite file")


def test_files_of_others(tmp_path):
    other = Model("other")
    graph = other.graph("serve")
    graph.output("y", graph.input("x", (1,), np.float32))
    refused(tmp_path / "a.tflite", bytes(other.pack()), "was not written by tfgptopt")


def test_a_newer_format_and_missing_fields(path, tmp_path):
    def newer(metadata):
        metadata["format_version"] = FORMAT_VERSION + 1

    whole = path.read_bytes()
    refused(tmp_path / "a.tflite", rewritten(whole, newer), "Update tfgptopt")
    for field in ("format_version", "decoder", "signatures"):
        changed = rewritten(whole, lambda metadata, field=field: metadata.pop(field))
        refused(tmp_path / "a.tflite", changed, "is damaged")


def test_an_older_format_and_a_missing_checksum(path, tmp_path):
    whole = path.read_bytes()
    older = rewritten(whole, lambda metadata: metadata.update(format_version=4))
    refused(tmp_path / "a.tflite", older, "has format 4; .* Export the model again")
    refused(tmp_path / "a.tflite", whole[:-16], "damaged or was cut off: the checksum")


def test_a_tokenizer_that_is_larger_than_the_model(path, tmp_path):
    def enlarge(metadata):
        tokenizer = tokenizers.Tokenizer.from_str(metadata["tokenizer"])
        tokenizer.add_tokens([f"<{i}>" for i in range(2)])
        metadata["tokenizer"] = tokenizer.to_str()

    (tmp_path / "a.tflite").write_bytes(rewritten(path.read_bytes(), enlarge))
    lm = TFLiteCausalLM(tmp_path / "a.tflite")
    assert len(lm.generate([1, 2], max_length=4, stop=None)) == 4  # The tokenizer is not read.
    with pytest.raises(ValueError, match="tokenizer has 302 tokens, and its model only 300"):
        lm.generate("text")


def test_any_change_of_content_changes_the_hash(path, tmp_path):
    first = read_container(path).content_hash
    other = tmp_path / "other.tflite"
    other.write_bytes(rewritten(path.read_bytes(), lambda m: m["generation"].update(extra=1)))
    assert read_container(other).content_hash != first
    other.write_bytes(path.read_bytes())
    assert read_container(other).content_hash == first
