"""What native code writes is held back, and standard error stays what it was."""

import os
import sys
import tempfile
import threading

import pytest

from tfgptopt.terminal.quiet import quiet_native_logs


def test_native_writes_are_held_back_unless_the_block_fails(capfd):
    with quiet_native_logs():
        os.write(2, b"a note")
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyError), quiet_native_logs():
        os.write(2, b"a note")
        raise KeyError
    assert capfd.readouterr().err == "a note"


def test_threads_take_turns_and_standard_error_is_put_back(capfd):
    before, start = os.fstat(2), threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(50):
            with quiet_native_logs():
                os.write(2, b"a note")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = os.fstat(2)
    assert (after.st_dev, after.st_ino) == (before.st_dev, before.st_ino)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_without_standard_error_or_a_place_for_the_log(capfd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        with quiet_native_logs():
            os.write(2, b"held back")
        patch.setattr(tempfile, "tempdir", "/no/such/folder")
        with quiet_native_logs():
            os.write(2, b"a note")
    assert capfd.readouterr().err == "a note"
