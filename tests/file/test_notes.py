"""Files that were found whole are not read again, until they change."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tfgptopt.file import container, notes
from tfgptopt.generation import TFLiteCausalLM, runtime, weight_cache

PROMPT = [5, 6, 7]


@pytest.fixture
def file(path, tmp_path, monkeypatch):
    """A copy of the file that is not said to be too new."""
    monkeypatch.setattr(notes, "_SETTLED_SECONDS", 0.0)
    return Path(shutil.copy(path, tmp_path / "copy.tflite"))


@pytest.fixture
def reads(monkeypatch):
    """Sizes of what is read to be checked."""
    found = []
    checksum = container.checksum

    def counted(file, size):
        found.append(size)
        return checksum(file, size)

    monkeypatch.setattr(container, "checksum", counted)
    monkeypatch.setattr(weight_cache, "checksum", counted)
    return found


def test_nothing_is_read_twice(file, tmp_path, reads):
    folder = tmp_path / "cache"
    expected = TFLiteCausalLM(file, weight_cache=folder).generate(PROMPT, stop=None)
    TFLiteCausalLM(file, weight_cache=folder)  # Checks the packed weights that the first one made.
    reads.clear()
    assert TFLiteCausalLM(file, weight_cache=folder).generate(PROMPT, stop=None) == expected
    assert reads == []


def test_a_change_is_seen_even_if_size_and_time_are_put_back(file, tmp_path, reads):
    folder = tmp_path / "cache"
    container.read_container(file, folder)
    container.read_container(file, folder)
    assert len(reads) == 1
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(before.st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(before.st_size // 2)
        opened.write(bytes([byte ^ 16]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="damaged"):
        container.read_container(file, folder)


def test_another_file_in_its_place_is_read(file, tmp_path, reads):
    folder = tmp_path / "cache"
    container.read_container(file, folder)
    Path(shutil.copy(file, tmp_path / "other")).replace(file)
    container.read_container(file, folder)
    assert len(reads) == 2


def test_a_new_file_is_not_noted(path, tmp_path, reads):
    copy = shutil.copy(path, tmp_path / "copy.tflite")
    for _ in range(2):
        container.read_container(copy, tmp_path / "cache")
    assert len(reads) == 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("folder", [None, "/proc/cache"])
def test_without_a_folder_files_are_always_read(file, reads, folder):
    for _ in range(2):
        container.read_container(file, folder and Path(folder))
    assert len(reads) == 2


@pytest.mark.parametrize("fact", ["st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
def test_a_note_is_of_all_that_tells_files_apart(file, tmp_path, fact):
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    facts = {name: getattr(file.stat(), name) for name in names}
    other = SimpleNamespace(**{**facts, fact: facts[fact] + 1})
    first = notes._note(SimpleNamespace(**facts), 7, tmp_path)
    assert notes._note(SimpleNamespace(**facts), 7, tmp_path) == first
    assert first != notes._note(other, 7, tmp_path) != notes._note(other, 8, tmp_path)


def test_notes_are_read_where_they_cannot_be_touched(file, tmp_path, reads, monkeypatch):
    container.read_container(file, tmp_path / "cache")

    def refused(*arguments, **keywords):
        raise PermissionError

    monkeypatch.setattr(notes.os, "utime", refused)
    container.read_container(file, tmp_path / "cache")
    assert len(reads) == 1


def test_a_file_that_is_replaced_while_it_is_loaded_is_refused(file, tmp_path, monkeypatch):
    other, folder = Path(shutil.copy(file, tmp_path / "other")), tmp_path / "cache"
    read = container.read_container

    def replaced(path, folder):
        found = read(path, folder)
        other.replace(path)
        return found

    monkeypatch.setattr(runtime, "read_container", replaced)
    with pytest.raises(ValueError, match="was replaced while it was being loaded"):
        TFLiteCausalLM(file, weight_cache=folder)
    assert not list(folder.glob("*.xnnpack"))
