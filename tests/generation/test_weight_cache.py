"""The folder of packed weights: used when whole, built once, never a reason to fail."""

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from tfgptopt.file import notes
from tfgptopt.generation import TFLiteCausalLM, weight_cache

PROMPT = [5, 6, 7]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.xnnpack"))


@pytest.fixture(scope="module")
def expected(lm):
    return lm.generate(PROMPT, stop=None)


def checksum_of(content: bytes) -> int:
    return zlib.crc32(zlib.crc32(content).to_bytes(4, "little"))


def generate(path, folder):
    return TFLiteCausalLM(path, weight_cache=folder).generate(PROMPT, stop=None)


def test_it_is_built_once_and_used_then(path, expected, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "cache"
    assert generate(path, folder) == expected
    (entry,) = entries(folder)
    before = entry.stat()
    used = []
    from_file = weight_cache.load.__globals__["_scratch"]
    monkeypatch.setattr(weight_cache, "_scratch", lambda: used.append(1) or from_file())
    assert generate(path, folder) == expected
    assert used == [] and entry.stat().st_ino == before.st_ino


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_built_again(path, expected, tmp_path, damage):
    generate(path, tmp_path)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    wrong = {"flip": bytes(flipped), "cut": whole[: len(whole) // 2], "empty": b""}[damage]
    entry.write_bytes(wrong)
    assert generate(path, tmp_path) == expected
    (entry,) = entries(tmp_path)
    assert entry.read_bytes() == whole


def test_an_entry_of_another_model_or_machine_is_left_alone(path, expected, tmp_path, monkeypatch):
    generate(path, tmp_path)
    monkeypatch.setattr(weight_cache, "_machine", lambda: "another")
    assert generate(path, tmp_path) == expected
    assert len(entries(tmp_path)) == 2


def test_a_folder_that_cannot_be_used_is_no_error(path, expected, tmp_path):
    a_file = tmp_path / "file"
    a_file.write_bytes(b"")
    assert generate(path, a_file / "cache") == expected
    assert generate(path, "/proc/cache") == expected
    assert generate(path, False) == expected


def test_processes_that_start_together(path, expected, tmp_path):
    code = (
        "from tfgptopt.generation import TFLiteCausalLM\n"
        f"lm = TFLiteCausalLM({str(path)!r}, weight_cache={str(tmp_path)!r})\n"
        f"print(lm.generate({PROMPT}, stop=None))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.communicate(timeout=120)[0].strip() == str(expected)
        assert process.returncode == 0
    assert len(entries(tmp_path)) == 1
    assert not list(tmp_path.glob("building-*"))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_a_full_disk_is_no_error(path, expected, tmp_path):
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from tfgptopt.generation import TFLiteCausalLM, weight_cache\n"
        "store = weight_cache._store\n"
        "def full(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        store(*arguments)\n"
        "    finally:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "weight_cache._store = full\n"
        f"lm = TFLiteCausalLM({str(path)!r}, weight_cache={str(tmp_path)!r})\n"
        f"print(lm.generate({PROMPT}, stop=None))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(expected)
    assert not entries(tmp_path) and not list(tmp_path.glob("building-*"))


@pytest.mark.parametrize("kept", [True, False])
def test_a_limit_on_the_size_of_files_is_no_error(path, expected, tmp_path, kept):
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "from tfgptopt.generation import TFLiteCausalLM\n"
        f"lm = TFLiteCausalLM({str(path)!r}, weight_cache={str(tmp_path) if kept else False!r})\n"
        f"print(lm.generate({PROMPT}, stop=None))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(expected)
    # That the file is whole may be noted, without content.
    assert not [name for name in tmp_path.iterdir() if not name.name.startswith("whole-")]


def test_old_entries_and_abandoned_work_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_cache, "_MOST_BYTES", 250)
    now = time.time()
    for age in range(4):
        entry = tmp_path / f"{age}.xnnpack"
        entry.write_bytes(bytes(100))
        os.utime(entry, (now - age, now - age))
    (tmp_path / "building-old").write_bytes(b"")
    os.utime(tmp_path / "building-old", (now - 9999, now - 9999))
    (tmp_path / "building-new").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(bytes(900))
    for name, days in (("whole-new", 1), ("whole-old", 100)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - days * 86400, now - days * 86400))
    weight_cache._remove_old(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"0.xnnpack", "1.xnnpack", "building-new", "notes.txt", "whole-new"}


def test_an_old_entry_that_was_used_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_cache, "_MOST_BYTES", 250)
    now = time.time()
    for age in range(4):
        content = bytes([age] * 100)
        entry = tmp_path / f"a-{checksum_of(content):08x}.xnnpack"
        entry.write_bytes(content)
        os.utime(entry, (now - age - 10, now - age - 10))
        oldest = entry
    monkeypatch.setattr(notes, "_SETTLED_SECONDS", 0.0)
    notes.add_note(oldest.stat(), checksum_of(bytes([3] * 100)), tmp_path)
    weight_cache._remove_old(tmp_path)
    assert oldest.is_file() and len(entries(tmp_path)) == 2


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TFGPTOPT_WEIGHT_CACHE", str(tmp_path / "named"))
    assert weight_cache.cache_folder(True) == tmp_path / "named"
    assert weight_cache.cache_folder(tmp_path) == tmp_path
    assert weight_cache.cache_folder(False) is None
    monkeypatch.setenv("TFGPTOPT_WEIGHT_CACHE", "off")
    assert weight_cache.cache_folder(True) is None
    monkeypatch.delenv("TFGPTOPT_WEIGHT_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weight_cache.cache_folder(True) == tmp_path / "tfgptopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weight_cache.cache_folder(True) == tmp_path / ".cache" / "tfgptopt"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert weight_cache.cache_folder(True) == tmp_path / "Library/Caches/tfgptopt"
