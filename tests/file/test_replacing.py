"""Targets that are there whole or not at all, whoever writes, reads or dies."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tfgptopt.file.replacing import replacing


def write(target: Path, text: str, count: int = 3) -> None:
    with replacing(target) as temporary:
        temporary.mkdir()
        for i in range(count):
            (temporary / f"part{i}").write_text(text)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_is_removed_and_nothing_else(number, tmp_path):
    target = tmp_path / "model.tflite"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tfgptopt.file.replacing import replacing\n"
        f"with replacing(Path({str(target)!r})) as temporary:\n"
        "    temporary.write_text('half')\n    print('half', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n"
    # Of somebody who still writes, of a user, and of another target.
    with replacing(target) as mine:
        mine.write_text("first")
        for name in (".model.tflite.mine", ".other.tflite.tfgptopt-abcd"):
            (tmp_path / name).mkdir()
        left = {path.name for path in tmp_path.iterdir() if ".tfgptopt-" in path.name}
        assert len(left) == 3
    child.send_signal(number)
    child.wait()
    assert len(list(tmp_path.glob(".model.tflite.tfgptopt-*"))) == 1
    with replacing(target) as mine:
        mine.write_text("second")
    assert target.read_text() == "second"
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.tflite", ".model.tflite.mine", ".other.tflite.tfgptopt-abcd"
    }  # fmt: skip


def test_a_folder_that_several_replace_is_always_there_and_never_mixed(tmp_path):
    target = tmp_path / "saved_model"
    write(target, "0")
    done = threading.Event()
    wrong = []

    def read() -> None:
        while not done.is_set():
            try:
                folder = os.open(target, os.O_RDONLY)  # What is opened stays what it was.
            except FileNotFoundError:
                wrong.append("missing")
                continue
            names = os.listdir(folder)  # noqa: PTH208
            texts = set()
            for name in names:
                try:
                    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
                        texts.add(file.read())
                except FileNotFoundError:  # It was replaced and removed meanwhile.
                    break
            if len(texts) > 1:
                wrong.append(texts)
            os.close(folder)

    def replace(name: str) -> None:
        for i in range(40):
            write(target, f"{name}{i}")

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=replace, args=(name,)) for name in "ab"]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["saved_model"]
    assert {path.read_text() for path in target.iterdir()} <= {"a39", "b39"}


def test_without_a_way_to_exchange_names_folders_are_replaced_all_the_same(tmp_path, monkeypatch):
    from tfgptopt.file import replacing as module

    monkeypatch.setattr(module, "_exchanged", lambda one, other: False)
    for text in ("one", "two"):
        write(tmp_path / "folder", text)
    assert (tmp_path / "folder" / "part2").read_text() == "two"
    with pytest.raises(RuntimeError), replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert (tmp_path / "folder" / "part2").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1
