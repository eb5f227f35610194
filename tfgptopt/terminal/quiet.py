"""Keeps the start-up log of native libraries off the screen."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

# Standard error belongs to the process: of two threads, each would put back what the other put.
_turn = threading.RLock()


@contextlib.contextmanager
def quiet_native_logs() -> Iterator[None]:
    """Holds back what native code writes to standard error, and shows it if the block fails.

    TensorFlow and LiteRT write a page of notes when they load, and have no setting against it. What
    other threads write meanwhile is held back too, so keep the block short. Threads take turns.
    """
    with _turn, contextlib.ExitStack() as stack:
        log = saved = None
        with contextlib.suppress(OSError):  # No folder for temporary files, or no standard error.
            log = stack.enter_context(tempfile.TemporaryFile())
            saved = os.dup(2)
        if log is None or saved is None:
            yield
            return
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(log.fileno(), 2)
            yield
        except BaseException:
            log.seek(0)
            with contextlib.suppress(OSError):
                os.write(saved, log.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
